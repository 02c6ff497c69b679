// The one function of libtorch_cuda.so that the CUDA library uses; see cmake/cuda.cmake. Never installed, never called.
extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
