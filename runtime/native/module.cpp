// The Python side: `_kernels`. Addresses of tensors come in as integers and are checked where the tensors are made
// (`kernels.py`); the interpreter lock is released while a kernel runs.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "common.h"
#include "lanes.h"
#include "pool.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define PIMOE_X86 1
#endif

namespace pimoe {

#ifdef PIMOE_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx2,fma,bmi2,prefer-vector-width=512")
namespace avx512 {
#include "vector_avx512.h"
#include "products.h"
#include "attention.h"
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
namespace avx2 {
#include "vector_generic.h"
#include "products.h"
#include "attention.h"
}  // namespace avx2
#pragma GCC pop_options
#endif

namespace portable {
#include "vector_generic.h"
#include "products.h"
#include "attention.h"
}  // namespace portable

struct Kernels {
  const char* name;
  bool pairs_of_bytes;  // int8 with bfloat16: whether weights are signs and magnitudes in pairs (see `packing.py`)
  void (*experts)(const Experts&, const Dispatch&, int);
  void (*product)(Kind, const Matrix&, const void*, int64_t, void*, bool, int64_t, int);
  void (*norm)(Kind, const void*, const void*, int64_t, int64_t, float, void*);
  void (*add)(Kind, const void*, const float*, int64_t, void*);
  void (*project)(const Attention&, const Tokens&, const void*, void*, int);
  void (*attend)(const Attention&, const Tokens&, const Queries&, const void*, void*, int);
  void (*finish)(const Attention&, const void*, const void*, const int64_t*, int64_t, void*, void*, int);
  void (*route)(Kind, const Matrix&, int64_t, const void*, int64_t, int64_t, bool, bool, int64_t*, float*);
};

#define PIMOE_KERNELS(name, pairs_of_bytes)                                                                      \
  {                                                                                                              \
    #name, pairs_of_bytes, name::run_experts, name::run_product, name::run_norm, name::run_add,                  \
        name::run_project, name::run_attend, name::run_finish, name::run_route                                   \
  }

const Kernels PORTABLE PIMOE_KERNELS(portable, false);
#ifdef PIMOE_X86
const Kernels AVX2 PIMOE_KERNELS(avx2, false);
const Kernels AVX512 PIMOE_KERNELS(avx512, true);
#endif

const Kernels* kernels_named(const char* name) {
#ifdef PIMOE_X86
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool best = std::strcmp(name, "best") == 0;
  if (avx512 && (best || std::strcmp(name, AVX512.name) == 0)) return &AVX512;
  if (avx2 && (best || std::strcmp(name, AVX2.name) == 0)) return &AVX2;
  if (best || std::strcmp(name, PORTABLE.name) == 0) return &PORTABLE;
  return nullptr;
#else
  return std::strcmp(name, "best") == 0 || std::strcmp(name, PORTABLE.name) == 0 ? &PORTABLE : nullptr;
#endif
}

const Kernels* chosen = &PORTABLE;

}  // namespace pimoe

using namespace pimoe;

namespace {

template <class T> T* pointer(PyObject* object) { return static_cast<T*>(PyLong_AsVoidPtr(object)); }

bool expect(Py_ssize_t found, Py_ssize_t wanted) {
  if (found == wanted) return true;
  PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", wanted, found);
  return false;
}

// Runs a kernel without the interpreter lock.
template <class Run> PyObject* released(Run run) {
  if (PyErr_Occurred()) return nullptr;
  bool enough = true, failed = false;
  Py_BEGIN_ALLOW_THREADS;
  try {
    run();
  } catch (const std::bad_alloc&) {
    enough = false;
  } catch (...) {  // into the interpreter's frames it must not go
    failed = true;
  }
  Py_END_ALLOW_THREADS;
  if (!enough) return PyErr_NoMemory();
  if (failed) {
    PyErr_SetString(PyExc_RuntimeError, "a kernel failed");
    return nullptr;
  }
  Py_RETURN_NONE;
}

template <class T> PyObject* capsule(T&& value, const char* name) {
  return PyCapsule_New(new T(value), name, [](PyObject* self) {
    delete static_cast<T*>(PyCapsule_GetPointer(self, PyCapsule_GetName(self)));
  });
}

PyObject* use(PyObject*, PyObject* name) {
  const char* text = PyUnicode_AsUTF8(name);
  if (text == nullptr) return nullptr;
  const Kernels* found = kernels_named(text);
  if (found == nullptr) return PyErr_Format(PyExc_ValueError, "this machine has no kernels named %R", name);
  chosen = found;
  return Py_BuildValue("sO", found->name, found->pairs_of_bytes ? Py_True : Py_False);
}

// matrix(weights, scales, bias, columns, k)
PyObject* matrix(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 5)) return nullptr;
  Matrix made{pointer<const uint8_t>(args[0]), pointer<const float>(args[1]), pointer<const float>(args[2]),
              PyLong_AsLongLong(args[3]), PyLong_AsLongLong(args[4])};
  return PyErr_Occurred() ? nullptr : capsule(std::move(made), "matrix");
}

// experts(kind, activation, alpha, limit, experts, hidden, inner, gate_up, down)
PyObject* experts(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 9)) return nullptr;
  const auto* gate_up = static_cast<Matrix*>(PyCapsule_GetPointer(args[7], "matrix"));
  const auto* down = static_cast<Matrix*>(PyCapsule_GetPointer(args[8], "matrix"));
  if (gate_up == nullptr || down == nullptr) return nullptr;
  Experts made{Kind(PyLong_AsLong(args[0])),
               Activation(PyLong_AsLong(args[1])),
               float(PyFloat_AsDouble(args[2])),
               float(PyFloat_AsDouble(args[3])),
               PyLong_AsLongLong(args[4]),
               PyLong_AsLongLong(args[5]),
               PyLong_AsLongLong(args[6]),
               *gate_up,
               *down};
  return PyErr_Occurred() ? nullptr : capsule(std::move(made), "experts");
}

// run_experts(experts, hidden, offsets, experts_of_pairs, weights, out, rows, pairs, threads): whether the pairs fit;
// if not, nothing was computed.
PyObject* run_experts(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 9)) return nullptr;
  const auto* layer = static_cast<Experts*>(PyCapsule_GetPointer(args[0], "experts"));
  if (layer == nullptr) return nullptr;
  const Dispatch work{pointer<const void>(args[1]),  pointer<const int32_t>(args[2]), pointer<const int32_t>(args[3]),
                      pointer<const float>(args[4]), pointer<float>(args[5]),         PyLong_AsLongLong(args[6]),  PyLong_AsLongLong(args[7])};
  const int threads = int(PyLong_AsLong(args[8]));
  if (PyErr_Occurred()) return nullptr;
  if (!pairs_fit(*layer, work)) Py_RETURN_FALSE;
  PyObject* done = released([&] { chosen->experts(*layer, work, threads); });
  if (done == nullptr) return nullptr;
  Py_DECREF(done);
  Py_RETURN_TRUE;
}

// run_product(kind, matrix, rows, count, out, out_f32, columns, threads)
PyObject* run_product(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 8)) return nullptr;
  const Kind kind = Kind(PyLong_AsLong(args[0]));
  const auto* weights = static_cast<Matrix*>(PyCapsule_GetPointer(args[1], "matrix"));
  if (weights == nullptr) return nullptr;
  const void* rows = pointer<const void>(args[2]);
  const int64_t number = PyLong_AsLongLong(args[3]), columns = PyLong_AsLongLong(args[6]);
  void* out = pointer<void>(args[4]);
  const bool out_f32 = PyObject_IsTrue(args[5]) == 1;
  const int threads = int(PyLong_AsLong(args[7]));
  return released([&] { chosen->product(kind, *weights, rows, number, out, out_f32, columns, threads); });
}

// attention(kind, hidden, heads, kv_heads, head_dim, eps, scale, clip, window, qk_norm, input_norm, qk_scale, post_norm,
// sinks, qkv, output)
PyObject* attention(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 16)) return nullptr;
  const auto* qkv = static_cast<Matrix*>(PyCapsule_GetPointer(args[14], "matrix"));
  const auto* output = static_cast<Matrix*>(PyCapsule_GetPointer(args[15], "matrix"));
  if (qkv == nullptr || output == nullptr) return nullptr;
  Attention made{Kind(PyLong_AsLong(args[0])),
                 PyLong_AsLongLong(args[1]),
                 PyLong_AsLongLong(args[2]),
                 PyLong_AsLongLong(args[3]),
                 PyLong_AsLongLong(args[4]),
                 float(PyFloat_AsDouble(args[5])),
                 float(PyFloat_AsDouble(args[6])),
                 float(PyFloat_AsDouble(args[7])),
                 PyLong_AsLongLong(args[8]),
                 int(PyLong_AsLong(args[9])),
                 pointer<const void>(args[10]),
                 pointer<const void>(args[11]),
                 pointer<const void>(args[12]),
                 pointer<const float>(args[13]),
                 *qkv,
                 *output};
  return PyErr_Occurred() ? nullptr : capsule(std::move(made), "attention");
}

// tokens(count, positions, cache_rows, rotary, cache, block_tokens) from args[0] on
Tokens tokens_from(PyObject* const* args) {
  return {PyLong_AsLongLong(args[0]),    pointer<const int64_t>(args[1]), pointer<const int64_t>(args[2]),
          pointer<const float>(args[3]), pointer<void>(args[4]),          PyLong_AsLongLong(args[5])};
}

// run_project(attention, tokens..., hidden, queries, threads)
PyObject* run_project(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 10)) return nullptr;
  const auto* layer = static_cast<Attention*>(PyCapsule_GetPointer(args[0], "attention"));
  if (layer == nullptr) return nullptr;
  const Tokens tokens = tokens_from(args + 1);
  const void* hidden = pointer<const void>(args[7]);
  void* queries = pointer<void>(args[8]);
  const int threads = int(PyLong_AsLong(args[9]));
  return released([&] { chosen->project(*layer, tokens, hidden, queries, threads); });
}

// run_attend(attention, tokens..., count, rows, tables, blocks, queries, out, threads)
PyObject* run_attend(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 14)) return nullptr;
  const auto* layer = static_cast<Attention*>(PyCapsule_GetPointer(args[0], "attention"));
  if (layer == nullptr) return nullptr;
  const Tokens tokens = tokens_from(args + 1);
  const Queries named{PyLong_AsLongLong(args[7]), pointer<const int32_t>(args[8]), pointer<const int32_t>(args[9]),
                      pointer<const int32_t>(args[10])};
  const void* queries = pointer<const void>(args[11]);
  void* out = pointer<void>(args[12]);
  const int threads = int(PyLong_AsLong(args[13]));
  return released([&] { chosen->attend(*layer, tokens, named, queries, out, threads); });
}

// run_finish(attention, attended, hidden, rows, count, out, normed, threads)
PyObject* run_finish(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 8)) return nullptr;
  const auto* layer = static_cast<Attention*>(PyCapsule_GetPointer(args[0], "attention"));
  if (layer == nullptr) return nullptr;
  const void* attended = pointer<const void>(args[1]);
  const void* hidden = pointer<const void>(args[2]);
  const auto* rows = pointer<const int64_t>(args[3]);
  const int64_t number = PyLong_AsLongLong(args[4]);
  void* out = pointer<void>(args[5]);
  void* normed = pointer<void>(args[6]);
  const int threads = int(PyLong_AsLong(args[7]));
  return released([&] { chosen->finish(*layer, attended, hidden, rows, number, out, normed, threads); });
}

// run_norm(kind, rows, scale, count, width, eps, out)
PyObject* run_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 7)) return nullptr;
  const Kind kind = Kind(PyLong_AsLong(args[0]));
  const void* rows = pointer<const void>(args[1]);
  const void* scale = pointer<const void>(args[2]);
  const int64_t number = PyLong_AsLongLong(args[3]), width = PyLong_AsLongLong(args[4]);
  const float eps = float(PyFloat_AsDouble(args[5]));
  void* out = pointer<void>(args[6]);
  return released([&] { chosen->norm(kind, rows, scale, number, width, eps, out); });
}

// run_add(kind, hidden, added, numbers, out)
PyObject* run_add(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 5)) return nullptr;
  const Kind kind = Kind(PyLong_AsLong(args[0]));
  const void* hidden = pointer<const void>(args[1]);
  const auto* added = pointer<const float>(args[2]);
  const int64_t numbers = PyLong_AsLongLong(args[3]);
  void* out = pointer<void>(args[4]);
  return released([&] { chosen->add(kind, hidden, added, numbers, out); });
}

// run_route(kind, gate, experts, rows, count, top_k, renormalize, round_weights, ids, weights)
PyObject* run_route(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 10)) return nullptr;
  const Kind kind = Kind(PyLong_AsLong(args[0]));
  const auto* gate = static_cast<Matrix*>(PyCapsule_GetPointer(args[1], "matrix"));
  if (gate == nullptr) return nullptr;
  const int64_t experts = PyLong_AsLongLong(args[2]), number = PyLong_AsLongLong(args[4]);
  const int64_t top_k = PyLong_AsLongLong(args[5]);
  const void* rows = pointer<const void>(args[3]);
  const bool renormalize = PyObject_IsTrue(args[6]) == 1, round_weights = PyObject_IsTrue(args[7]) == 1;
  auto* ids = pointer<int64_t>(args[8]);
  auto* weights = pointer<float>(args[9]);
  return released([&] {
    chosen->route(kind, *gate, experts, rows, number, top_k, renormalize, round_weights, ids, weights);
  });
}

// serve_lane(socket, layers, control): layers is a list of experts and None; returns when the lane has ended
PyObject* serve_lane_on(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 3)) return nullptr;
  const int socket = int(PyLong_AsLong(args[0]));
  auto* control = pointer<LaneControl>(args[2]);
  const Py_ssize_t layers = PyList_Size(args[1]);
  if (layers < 0 || PyErr_Occurred()) return nullptr;
  std::vector<const Experts*> table;
  for (Py_ssize_t layer = 0; layer < layers; ++layer) {
    PyObject* held = PyList_GetItem(args[1], layer);
    table.push_back(held == Py_None ? nullptr : static_cast<Experts*>(PyCapsule_GetPointer(held, "experts")));
    if (PyErr_Occurred()) return nullptr;
  }
  return released([&] { serve_lane(socket, table.data(), int64_t(layers), control, chosen->experts); });
}

// dispatch(sockets, groups, group_of, local_of, experts, layer, tokens, top_k, hidden, number_bytes, expert_ids,
// weights, states, out, timeout_ns, sequence, expert_pairs, group_rows, computed_ns): see dispatch_on_lanes
PyObject* dispatch(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 19)) return nullptr;
  const LaneWork work{pointer<const int>(args[0]),
                      PyLong_AsLongLong(args[1]),
                      pointer<const int16_t>(args[2]),
                      pointer<const int32_t>(args[3]),
                      PyLong_AsLongLong(args[4]),
                      PyLong_AsLongLong(args[5]),
                      PyLong_AsLongLong(args[6]),
                      PyLong_AsLongLong(args[7]),
                      PyLong_AsLongLong(args[8]),
                      PyLong_AsLongLong(args[9]),
                      pointer<const int64_t>(args[10]),
                      pointer<const float>(args[11]),
                      pointer<const char>(args[12]),
                      pointer<float>(args[13]),
                      PyLong_AsUnsignedLongLong(args[14]),
                      PyLong_AsUnsignedLongLong(args[15]),
                      pointer<int64_t>(args[16]),
                      pointer<int64_t>(args[17]),
                      pointer<int64_t>(args[18])};
  int64_t largest = 0;
  PyObject* done = released([&] { largest = dispatch_on_lanes(work); });
  if (done == nullptr) return nullptr;
  Py_DECREF(done);
  return PyLong_FromLongLong(largest);
}

#define PIMOE_FAST(name) \
  { #name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(name)), METH_FASTCALL, nullptr }

PyMethodDef methods[] = {
    {"use", use, METH_O, "Choose kernels by name, or the best; returns their name and how they want int8 packed."},
    PIMOE_FAST(matrix),
    PIMOE_FAST(experts),
    PIMOE_FAST(run_experts),
    PIMOE_FAST(run_product),
    PIMOE_FAST(attention),
    PIMOE_FAST(run_project),
    PIMOE_FAST(run_attend),
    PIMOE_FAST(run_finish),
    PIMOE_FAST(run_norm),
    PIMOE_FAST(run_add),
    PIMOE_FAST(run_route),
    PIMOE_FAST(serve_lane_on),
    PIMOE_FAST(dispatch),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", "See kernels.py.", -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit__kernels() {
  chosen = kernels_named("best");
  return PyModule_Create(&definition);
}
