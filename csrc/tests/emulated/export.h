#pragma once

#define EMULATED(name) extern "C" __attribute__((visibility("default"))) int emulated_##name
