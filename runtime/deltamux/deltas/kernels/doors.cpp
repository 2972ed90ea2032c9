// The way from a compiled model to the kernels, with no Python in between.
//
// A model asks the doors of all its modules in every step. What that costs is not computing but memory: between two doors
// the weights of a projection have passed through the caches, and whatever a door touches comes from RAM. So a door is a
// few words in one place: the slots of the step, those that have something here, and the tables that hold it. What the
// kernels cannot do goes to the functions in Python that the doors stand in for. The interpreter's lock is kept: a kernel
// takes microseconds in a step of decoding, and whoever took the lock meanwhile might keep it for milliseconds.
//
// Everything that a door points to is Python's (doors.py), which keeps it alive.

#if __has_include(<Python.h>)
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/dlpack.h>

#include <vector>

#include "rows.h"

namespace {

// The step that is running.
struct Step {
    const Mask* slots;  // slots that have a row
    const Rows* rows;
    int64_t in_python;  // whether Python alone knows how to apply deltas in it
};

// One kernel of a module, and what it reads and changes.
struct Lane {
    const Table* table;
    int64_t reads_residual;
    int64_t changes_input;
};

// The deltas at one module, in the order in which they apply.
struct Lanes {
    const Mask* slots;         // slots that have any
    const Mask* input_slots;   // those that have one that changes the input
    const Mask* python_slots;  // those that have one without a kernel
    const Lane* lanes;
    int64_t count;
};

struct Door {
    const Step* step;
    const Lanes* own;
    const Lanes* sub_layer;  // of the sub-layer that the module ends; or else `own`
};

enum Function { kChangeInput, kChangeOutput, kChangeSubLayer, kFunctions };

std::vector<Door> doors;
PyObject* in_python[kFunctions];  // what each function stands in for
const DLPackExchangeAPI* tensors;

// A tensor [rows, columns].
struct View {
    void* data;
    int64_t stride;
    bool bfloat;
};

// Looks at a tensor; false with an exception set where it is none that a kernel can take.
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

// Where a call is to be served; `Nowhere` for a step that has nothing here.
enum Way { kNowhere, kKernels, kPython };

Way way_of(const Step& step, const Lanes& lanes) {
    if (!meet(*step.slots, *lanes.slots)) return kNowhere;
    return step.in_python || meet(*step.slots, *lanes.python_slots) ? kPython : kKernels;
}

// Applies the lanes that change a module's input, or those that change its output; false with an exception set.
bool apply(const Step& step, const Lanes& lanes, bool to_input, View x, View residual, View y) {
    for (const Lane* lane = lanes.lanes; lane < lanes.lanes + lanes.count; ++lane) {
        if (bool(lane->changes_input) != to_input || !meet(*step.slots, *lane->table->held)) continue;
        const View from = lane->reads_residual ? residual : x;
        if (from.bfloat != bool(lane->table->bfloat) || y.bfloat != from.bfloat) {
            PyErr_SetString(PyExc_ValueError, "a module's input or output is not of the dtype that its deltas have");
            return false;
        }
        deltamux_apply(lane->table, step.rows, from.data, from.stride, y.data, y.stride);
    }
    return true;
}

// Returns the door whose number is the last argument; null where there is none of that number, or with an exception set.
const Door* door_of(PyObject* const* arguments, Py_ssize_t given, Py_ssize_t wanted) {
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "a door takes %zd arguments, not %zd", wanted, given);
        return nullptr;
    }
    const Py_ssize_t number = PyLong_AsSsize_t(arguments[wanted - 1]);
    if (number == -1 && PyErr_Occurred()) return nullptr;
    return number >= 0 && size_t(number) < doors.size() && doors[number].step ? &doors[number] : nullptr;
}

PyObject* pass_on(Function function, PyObject* const* arguments, Py_ssize_t given) {
    return PyErr_Occurred() ? nullptr : PyObject_Vectorcall(in_python[function], arguments, given, nullptr);
}

PyObject* change_input(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
    const Door* door = door_of(arguments, given, 2);
    const Way way = door ? way_of(*door->step, *door->own) : kPython;
    if (way == kPython) return pass_on(kChangeInput, arguments, given);
    if (way == kKernels && meet(*door->step->slots, *door->own->input_slots)) {
        View x;
        if (!view(arguments[0], x) || !apply(*door->step, *door->own, true, x, x, x)) return nullptr;
    }
    Py_RETURN_NONE;
}

PyObject* change_output(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
    const Door* door = door_of(arguments, given, 3);
    Way way = door ? way_of(*door->step, *door->own) : kPython;
    // A module whose input others read as well has to run again.
    if (way == kKernels && meet(*door->step->slots, *door->own->input_slots)) way = kPython;
    if (way == kPython) return pass_on(kChangeOutput, arguments, given);
    if (way == kKernels) {
        View x, y;
        if (!view(arguments[0], x) || !view(arguments[1], y)) return nullptr;
        if (!apply(*door->step, *door->own, false, x, x, y)) return nullptr;
    }
    Py_RETURN_NONE;
}

PyObject* change_sub_layer(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
    const Door* door = door_of(arguments, given, 5);
    const Way own = door ? way_of(*door->step, *door->own) : kPython;
    const Way sub_layer = door ? way_of(*door->step, *door->sub_layer) : kPython;
    if (own == kPython || sub_layer == kPython) return pass_on(kChangeSubLayer, arguments, given);
    if (own == kNowhere && sub_layer == kNowhere) Py_RETURN_NONE;
    View x, read, residual, y;
    if (!view(arguments[0], x) || !view(arguments[1], read) || !view(arguments[3], y)) return nullptr;
    if (arguments[2] == Py_None)
        residual = read;
    else if (!view(arguments[2], residual))
        return nullptr;
    if (own == kKernels && !apply(*door->step, *door->own, false, x, x, y)) return nullptr;
    if (sub_layer == kKernels && !apply(*door->step, *door->sub_layer, false, read, residual, y)) return nullptr;
    Py_RETURN_NONE;
}

PyObject* open_door(PyObject*, PyObject* arguments) {
    Py_ssize_t number;
    unsigned long long step, own, sub_layer;
    if (!PyArg_ParseTuple(arguments, "nKKK", &number, &step, &own, &sub_layer)) return nullptr;
    if (size_t(number) >= doors.size()) doors.resize(number + 1);
    doors[number] = {reinterpret_cast<const Step*>(step), reinterpret_cast<const Lanes*>(own),
                     reinterpret_cast<const Lanes*>(sub_layer)};
    Py_RETURN_NONE;
}

PyObject* stand_in(PyObject*, PyObject* arguments) {
    PyObject *functions[kFunctions], *capsule;
    if (!PyArg_ParseTuple(arguments, "OOOO", &capsule, &functions[0], &functions[1], &functions[2])) return nullptr;
    const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (!api) return nullptr;
    if (api->header.version.major != DLPACK_MAJOR_VERSION || !api->dltensor_from_py_object_no_sync) {
        PyErr_SetString(PyExc_ImportError, "this torch does not let tensors be read without copying (DLPack)");
        return nullptr;
    }
    tensors = api;
    for (int i = 0; i < kFunctions; ++i) {
        Py_INCREF(functions[i]);
        Py_XSETREF(in_python[i], functions[i]);
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
    {"open", open_door, METH_VARARGS, "open(number, step, own, sub_layer): opens a door on structures at these addresses."},
    {"stand_in", stand_in, METH_VARARGS,
     "stand_in(exchange, change_input, change_output, change_sub_layer): names torch's DLPack functions, and the functions "
     "that take what the kernels cannot do."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "deltamux_doors", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_deltamux_doors() { return PyModule_Create(&module); }

#endif
