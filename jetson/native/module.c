/* Makes the operators' library a Python module, so that setuptools builds it, wheels carry it and Python finds it.
 * All that it tells Python is `vector_unit`, the widest that this processor has of those that the loops are written for. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "linear.h"

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_native", "Operators for ONNX Runtime: see export/native.py and export/decoder.py.", 0, NULL, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) {
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddStringConstant(made, "vector_unit", vector_unit()) < 0) Py_CLEAR(made);
    return made;
}
