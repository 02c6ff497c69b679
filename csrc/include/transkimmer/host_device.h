// For functions that the host and the device share.
#pragma once

#ifdef __CUDACC__
#define TRANSKIMMER_HOST_DEVICE __host__ __device__
#else
#define TRANSKIMMER_HOST_DEVICE
#endif
