/* A CUDA without a card, for onnxruntime's real CUDA provider: memory is the host's, kernels do
   nothing. Devices, options, node assignment, bindings and errors are the provider's own.
   Everything else that it links to returns 0 (tests/support/cuda_stub.py).
   STUB_DEVICES=0 stands for a machine without a device. */
#include <driver_types.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NO_DEVICE = 100, INVALID_DEVICE = 101, NOT_FOUND = 500 };

static char handle[1 << 16];
static int current = 0;

static int devices(void) {
  const char *count = getenv("STUB_DEVICES");
  return count ? atoi(count) : 1;
}

int cudaGetDeviceCount(int *count) {
  *count = devices();
  return *count > 0 ? 0 : NO_DEVICE;
}
int cudaGetDevice(int *device) {
  *device = current;
  return 0;
}
int cudaSetDevice(int device) {
  if (device >= devices()) return devices() ? INVALID_DEVICE : NO_DEVICE;
  current = device;
  return 0;
}
int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "stub %d", device);
  p->major = 9;
  p->multiProcessorCount = 132;
  p->totalGlobalMem = 80ull << 30;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxThreadsPerMultiProcessor = 2048;
  p->regsPerBlock = 65536;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->l2CacheSize = 50 << 20;
  return 0;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  *value = attribute == cudaDevAttrComputeCapabilityMajor       ? 9
           : attribute == cudaDevAttrMultiProcessorCount         ? 132
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 232448
           : attribute == cudaDevAttrMaxThreadsPerBlock           ? 1024
           : attribute == cudaDevAttrMaxThreadsPerMultiProcessor  ? 2048
                                                                  : 0;
  return 0;
}
int cuInit(unsigned flags) {
  (void)flags;
  return 0;
}
int cuDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}
int cuDeviceGetCount(int *count) {
  *count = devices();
  return 0;
}
int cuDeviceGetName(char *name, int size, int device) {
  snprintf(name, size, "stub %d", device);
  return 0;
}
int cudaDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}
int cudaRuntimeGetVersion(int *version) {
  *version = 13000;
  return 0;
}

static int take(void **p, size_t size) {
  *p = aligned_alloc(256, (size + 256) / 256 * 256);
  if (!*p) return 2;
  memset(*p, 0, size);
  return 0;
}
int cudaMalloc(void **p, size_t size) { return take(p, size); }
int cudaMallocHost(void **p, size_t size) { return take(p, size); }
int cudaHostAlloc(void **p, size_t size, unsigned flags) {
  (void)flags;
  return take(p, size);
}
int cudaMallocFromPoolAsync(void **p, size_t size, void *pool, void *stream) {
  (void)pool, (void)stream;
  return take(p, size);
}
int cudaFree(void *p) {
  free(p);
  return 0;
}
int cudaFreeHost(void *p) { return cudaFree(p); }
int cudaFreeAsync(void *p, void *stream) {
  (void)stream;
  return cudaFree(p);
}
int cudaMemGetInfo(size_t *left, size_t *total) {
  *left = 70ull << 30;
  *total = 80ull << 30;
  return 0;
}
int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
  (void)kind;
  memcpy(to, from, size);
  return 0;
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  (void)stream;
  return cudaMemcpy(to, from, size, kind);
}
int cudaMemset(void *p, int value, size_t size) {
  memset(p, value, size);
  return 0;
}
int cudaMemsetAsync(void *p, int value, size_t size, void *stream) {
  (void)stream;
  return cudaMemset(p, value, size);
}

static int give(void **p) {
  *p = malloc(16);
  return 0;
}
int cudaStreamCreate(void **p) { return give(p); }
int cudaStreamCreateWithFlags(void **p, unsigned flags) {
  (void)flags;
  return give(p);
}
int cudaEventCreate(void **p) { return give(p); }
int cudaEventCreateWithFlags(void **p, unsigned flags) {
  (void)flags;
  return give(p);
}
int cudaMemPoolCreate(void **p, const void *properties) {
  (void)properties;
  return give(p);
}
int cudaEventElapsedTime(float *time, void *start, void *end) {
  (void)start, (void)end;
  *time = 0.1f;
  return 0;
}
int cudaStreamIsCapturing(void *stream, int *status) {
  (void)stream;
  *status = 0;
  return 0;
}
int cudaStreamEndCapture(void *stream, void **graph) {
  (void)stream;
  return give(graph);
}
int cudaGraphInstantiate(void **run, void *graph, unsigned long long flags) {
  (void)graph, (void)flags;
  return give(run);
}
int cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *p) {
  (void)p;
  memset(attributes, 0, sizeof *attributes);
  attributes->type = cudaMemoryTypeDevice;
  return 0;
}
const char *cudaGetErrorString(int error) {
  return error == NO_DEVICE        ? "no CUDA-capable device is detected"
         : error == INVALID_DEVICE ? "invalid device ordinal"
                                   : "an error of the stub";
}
const char *cudaGetErrorName(int error) {
  (void)error;
  return "cudaErrorOfTheStub";
}
void **__cudaRegisterFatBinary(void *binary) {
  (void)binary;
  return (void **)handle;
}
int cudaGetDriverEntryPointByVersion(const char *name, void **p, unsigned version,
                                     unsigned long long flags, int *status) {
  (void)name, (void)version, (void)flags, (void)status;
  *p = 0;
  return NOT_FOUND;
}
int cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
  (void)function;
  memset(attributes, 0, sizeof *attributes);
  attributes->numRegs = 32;
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *function,
                                                           int block, size_t memory,
                                                           unsigned flags) {
  (void)function, (void)block, (void)memory, (void)flags;
  *count = 2;
  return 0;
}
int cublasCreate_v2(void **p) {
  *p = handle;
  return 0;
}
int cublasLtCreate(void **p) { return cublasCreate_v2(p); }
int cublasGetMathMode(void *p, int *mode) {
  (void)p;
  *mode = 0;
  return 0;
}
int cublasGetStream_v2(void *p, void **stream) {
  (void)p;
  *stream = 0;
  return 0;
}
