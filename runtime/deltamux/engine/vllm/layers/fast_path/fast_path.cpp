// From a compiled model to the CPU kernels, without Python.
//
// The custom ops of all modules are called in every step, and between two of them the weights of a projection pass through
// the caches: whatever a call touches comes from memory. So a layer is a few words in one place: the slots of the step, the
// slots that have ops here, and their parameters. What the kernels cannot do goes to the ops' Python functions, the
// fallbacks. The interpreter's lock is kept: a kernel takes microseconds in a step of decoding, and a thread that took the
// lock meanwhile might keep it for milliseconds.
//
// All memory that a layer points to is Python's (fast_path.py), which keeps it alive.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/dlpack.h>

#include <vector>

#include "rows.h"

namespace {

// The step that is running.
struct Step {
    const Mask* slots;  // slots that have a row
    const StepRows* rows;
    int64_t fallback;  // whether the step needs the fallbacks at every module
};

// One op of a module with a kernel, and what it reads and changes.
struct Op {
    const SlotParams* params;
    int64_t reads_residual;
    int64_t changes_input;
};

// The ops at one module, in the order in which they apply.
struct Module {
    const Mask* slots;           // slots that have any
    const Mask* input_slots;     // those that have one that changes the input
    const Mask* fallback_slots;  // those that have one without a kernel
    const Op* ops;
    int64_t count;
};

struct Layer {
    const Step* step;
    const Module* own;
    const Module* sub_layer;  // of the sub-layer that the module ends; or else `own`
};

enum Function { kChangeInput, kChangeOutput, kChangeSubLayer, kFunctions };

std::vector<Layer> layers;
PyObject* fallbacks[kFunctions];
decltype(&deltamux_apply) apply_kernel;
const DLPackExchangeAPI* tensors;

// A tensor [rows, columns].
struct View {
    void* data;
    int64_t stride;
    bool bfloat;
};

// Reads a tensor; false with an exception set where no kernel can take it.
bool view(PyObject* tensor, View& out) {
    DLTensor dl;
    if (tensors->dltensor_from_py_object_no_sync(tensor, &dl) != 0) return false;
    const bool bfloat = dl.dtype.code == kDLBfloat && dl.dtype.bits == 16;
    const bool matrix = dl.ndim == 2 && (dl.strides[1] == 1 || dl.shape[1] < 2) && dl.device.device_type == kDLCPU;
    if (!matrix || !(bfloat || (dl.dtype.code == kDLFloat && dl.dtype.bits == 32))) {
        PyErr_SetString(PyExc_ValueError, "a delta reads and changes matrices of float32 or bfloat16 with contiguous rows");
        return false;
    }
    out = {static_cast<char*>(dl.data) + dl.byte_offset, dl.strides[0], bfloat};
    return true;
}

// How a call is served; `kSkip` where no slot of the step has an op here.
enum Route { kSkip, kKernels, kFallback };

Route route_of(const Step& step, const Module& module) {
    if (!meet(*step.slots, *module.slots)) return kSkip;
    return step.fallback || meet(*step.slots, *module.fallback_slots) ? kFallback : kKernels;
}

// Applies the ops that change a module's input, or those that change its output; false with an exception set.
bool apply(const Step& step, const Module& module, bool to_input, View x, View residual, View y) {
    for (const Op* op = module.ops; op < module.ops + module.count; ++op) {
        if (bool(op->changes_input) != to_input || !meet(*step.slots, *op->params->held)) continue;
        const View from = op->reads_residual ? residual : x;
        if (from.bfloat != bool(op->params->bfloat) || y.bfloat != from.bfloat) {
            PyErr_SetString(PyExc_ValueError, "a module's input or output is not of the dtype that its deltas have");
            return false;
        }
        apply_kernel(op->params, step.rows, from.data, from.stride, y.data, y.stride);
    }
    return true;
}

// Returns the layer whose number is the last argument; null where there is none of that number, or with an exception set.
const Layer* layer_of(PyObject* const* arguments, Py_ssize_t given, Py_ssize_t wanted) {
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "a custom op of deltamux takes %zd arguments, not %zd", wanted, given);
        return nullptr;
    }
    const Py_ssize_t number = PyLong_AsSsize_t(arguments[wanted - 1]);
    if (number == -1 && PyErr_Occurred()) return nullptr;
    return number >= 0 && size_t(number) < layers.size() && layers[number].step ? &layers[number] : nullptr;
}

PyObject* call_fallback(Function function, PyObject* const* arguments, Py_ssize_t given) {
    return PyErr_Occurred() ? nullptr : PyObject_Vectorcall(fallbacks[function], arguments, given, nullptr);
}

PyObject* change_input(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
    const Layer* layer = layer_of(arguments, given, 2);
    const Route route = layer ? route_of(*layer->step, *layer->own) : kFallback;
    if (route == kFallback) return call_fallback(kChangeInput, arguments, given);
    if (route == kKernels && meet(*layer->step->slots, *layer->own->input_slots)) {
        View x;
        if (!view(arguments[0], x) || !apply(*layer->step, *layer->own, true, x, x, x)) return nullptr;
    }
    Py_RETURN_NONE;
}

PyObject* change_output(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
    const Layer* layer = layer_of(arguments, given, 3);
    Route route = layer ? route_of(*layer->step, *layer->own) : kFallback;
    // A module whose input others read as well has to run again.
    if (route == kKernels && meet(*layer->step->slots, *layer->own->input_slots)) route = kFallback;
    if (route == kFallback) return call_fallback(kChangeOutput, arguments, given);
    if (route == kKernels) {
        View x, y;
        if (!view(arguments[0], x) || !view(arguments[1], y)) return nullptr;
        if (!apply(*layer->step, *layer->own, false, x, x, y)) return nullptr;
    }
    Py_RETURN_NONE;
}

PyObject* change_sub_layer(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
    const Layer* layer = layer_of(arguments, given, 5);
    const Route own = layer ? route_of(*layer->step, *layer->own) : kFallback;
    const Route sub_layer = layer ? route_of(*layer->step, *layer->sub_layer) : kFallback;
    if (own == kFallback || sub_layer == kFallback) return call_fallback(kChangeSubLayer, arguments, given);
    if (own == kSkip && sub_layer == kSkip) Py_RETURN_NONE;
    View x, read, residual, y;
    if (!view(arguments[0], x) || !view(arguments[1], read) || !view(arguments[3], y)) return nullptr;
    if (arguments[2] == Py_None)
        residual = read;
    else if (!view(arguments[2], residual))
        return nullptr;
    if (own == kKernels && !apply(*layer->step, *layer->own, false, x, x, y)) return nullptr;
    if (sub_layer == kKernels && !apply(*layer->step, *layer->sub_layer, false, read, residual, y)) return nullptr;
    Py_RETURN_NONE;
}

PyObject* register_layer(PyObject*, PyObject* arguments) {
    Py_ssize_t number;
    unsigned long long step, own, sub_layer;
    if (!PyArg_ParseTuple(arguments, "nKKK", &number, &step, &own, &sub_layer)) return nullptr;
    if (size_t(number) >= layers.size()) layers.resize(number + 1);
    layers[number] = {reinterpret_cast<const Step*>(step), reinterpret_cast<const Module*>(own),
                     reinterpret_cast<const Module*>(sub_layer)};
    Py_RETURN_NONE;
}

PyObject* install(PyObject*, PyObject* arguments) {
    PyObject *functions[kFunctions], *capsule;
    unsigned long long kernel;
    if (!PyArg_ParseTuple(arguments, "KOOOO", &kernel, &capsule, &functions[0], &functions[1], &functions[2])) return nullptr;
    const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (!api) return nullptr;
    if (api->header.version.major != DLPACK_MAJOR_VERSION || !api->dltensor_from_py_object_no_sync) {
        PyErr_SetString(PyExc_ImportError, "this torch does not let tensors be read without copying (DLPack)");
        return nullptr;
    }
    tensors = api;
    apply_kernel = reinterpret_cast<decltype(apply_kernel)>(kernel);
    for (int i = 0; i < kFunctions; ++i) {
        Py_INCREF(functions[i]);
        Py_XSETREF(fallbacks[i], functions[i]);
    }
    Py_RETURN_NONE;
}

template <auto function> constexpr PyCFunction fast() {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"change_input", fast<change_input>(), METH_FASTCALL, "change_input(x, number): changes a module's input in place."},
    {"change_output", fast<change_output>(), METH_FASTCALL,
     "change_output(x, y, number): changes a module's output `y` of input `x` in place."},
    {"change_sub_layer", fast<change_sub_layer>(), METH_FASTCALL,
     "change_sub_layer(x, read, residual, y, number): changes the output `y` of a sub-layer in place."},
    {"register", register_layer, METH_VARARGS,
     "register(number, step, own, sub_layer): makes a layer known, of structures at these addresses."},
    {"install", install, METH_VARARGS,
     "install(kernel, exchange, change_input, change_output, change_sub_layer): takes the address of deltamux_apply, torch's "
     "DLPack functions, and the fallbacks."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "deltamux_fast_path", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_deltamux_fast_path() { return PyModule_Create(&definition); }
