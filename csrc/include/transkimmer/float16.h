// The 16-bit formats that the matrix kernels take.
#pragma once

namespace transkimmer {

enum class Float16 { kFp16, kBf16 };

}  // namespace transkimmer
