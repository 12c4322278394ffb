/* Makes the operator's library a Python module, so that setuptools builds it, wheels carry it and Python finds it.
 * It holds nothing for Python. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_native", "The head's step as an operator for ONNX Runtime: see export/native.py.", 0, NULL, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
