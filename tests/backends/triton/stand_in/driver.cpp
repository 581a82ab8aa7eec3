// Stands in for NVIDIA's driver where there is no GPU: it hands every launch to whoever has asked for them, and answers
// what else Triton and prefixcore ask of a driver. Handles are numbers; nothing is loaded, nothing runs here.
#include <cstdint>
#include <cstring>

extern "C" {

struct Launch {
  uint64_t function;
  uint32_t grid[3], block[3], shared;
  uint64_t stream;
  void** parameters;
  int32_t attributes;
};

using OnLaunch = int32_t (*)(const Launch*);

static OnLaunch on_launch = nullptr;
static thread_local uint64_t stream = 0;
static thread_local int64_t launches = 0;

void stand_in_on_launch(OnLaunch function) { on_launch = function; }
void stand_in_set_stream(uint64_t value) { stream = value; }
int64_t stand_in_launches() { return launches; }

int32_t prefixcore_stand_in_stream(int32_t, void** out) {
  *out = reinterpret_cast<void*>(stream);
  return 0;
}

static int32_t launched(const Launch& launch) {
  ++launches;
  return on_launch == nullptr ? 0 : on_launch(&launch);
}

int32_t cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                       unsigned shared, void* on, void** parameters, void**) {
  return launched({reinterpret_cast<uint64_t>(function), {x, y, z}, {bx, by, bz}, shared,
                   reinterpret_cast<uint64_t>(on), parameters, 0});
}

// CUlaunchConfig of cuda.h
struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned count;
};

int32_t cuLaunchKernelEx(const Config* c, void* function, void** parameters, void**) {
  return launched({reinterpret_cast<uint64_t>(function), {c->grid[0], c->grid[1], c->grid[2]},
                   {c->block[0], c->block[1], c->block[2]}, c->shared, reinterpret_cast<uint64_t>(c->stream), parameters,
                   static_cast<int32_t>(c->count)});
}

int32_t cuGetErrorString(int32_t, const char** text) {
  *text = "of the stand-in";
  return 0;
}

int32_t cuCtxGetCurrent(void** context) {
  *context = reinterpret_cast<void*>(1);
  return 0;
}

int32_t cuCtxSetCurrent(void*) { return 0; }
int32_t cuInit(unsigned) { return 0; }

int32_t cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}

int32_t cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}

int32_t cuDevicePrimaryCtxRetain(void** context, int) {
  *context = reinterpret_cast<void*>(1);
  return 0;
}

int32_t cuDeviceGetAttribute(int* value, int, int) {
  *value = 232448;  // the shared memory of a block, which is all that Triton decides by
  return 0;
}

int32_t cuModuleLoadData(void** module, const void*) {
  static uint64_t modules = 0x1000;
  *module = reinterpret_cast<void*>(++modules);
  return 0;
}

int32_t cuModuleUnload(void*) { return 0; }

int32_t cuModuleGetFunction(void** function, void* module, const char*) {
  *function = module;
  return 0;
}

int32_t cuFuncGetAttribute(int* value, int attribute, void*) {
  *value = attribute == 0 ? 1024 : 0;  // threads a block; no static shared memory, no local memory
  return 0;
}

int32_t cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}

int32_t cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}

int32_t cuCtxGetLimit(uint64_t* limit, int) {
  *limit = 0;
  return 0;
}

int32_t cuTensorMapEncodeTiled() { return 1; }
int32_t cuOccupancyMaxActiveClusters() { return 1; }

int32_t cuFuncSetAttribute(void*, int, int) { return 0; }
int32_t cuFuncSetCacheConfig(void*, int) { return 0; }
int32_t cuCtxSetLimit(int, uint64_t) { return 0; }
int32_t cuStreamIsCapturing(void*, int* status) {
  *status = 0;
  return 0;
}

int32_t cuPointerGetAttribute(void* data, int, uint64_t pointer) {
  std::memcpy(data, &pointer, sizeof pointer);
  return 0;
}
}
