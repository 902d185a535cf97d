// What DLPack's exchange table needs of its types (github.com/dmlc/dlpack, version 1): torch.Tensor offers the table as
// `__dlpack_c_exchange_api__`, and through it the native library reads a tensor without torch's headers and without a
// call of Python.
#pragma once
#include <stdint.h>

namespace mmfast {

constexpr uint32_t kDlpackMajor = 1;
constexpr int32_t kDlpackCpu = 1;
constexpr uint8_t kDlpackFloat = 2;

struct DlpackTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    const int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct DlpackExchange {
    uint32_t major, minor;
    void* previous;
    // not called here
    void *allocate, *from_object, *to_object;
    // fills a view of a tensor, which it does not own; not 0: a Python error is set
    int (*view_of_object)(void* object, DlpackTensor* view);
    void* stream;
};

}  // namespace mmfast
