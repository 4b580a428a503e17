"""Speeds of products on a CPU by kind, path and number of rows, relative to plain bf16: the data of `table.py`.

Made by `python -m trine.benchmarks.cpu_quantized` (its results lie in `benchmarks/results/`), which says how they were
measured. 1 is a product of bf16 rows with a bf16 weight of the same shape by `torch.nn.functional.linear` (in the line
"torch" of that product it is not exactly 1: it ran against itself). 0: not measured, for it does every few rows anew,
or (slabs) is made for many. Packed weights at 64 and 256 rows were measured anew with slabs, on a busier machine.
"""

from __future__ import annotations

ROWS = (1, 2, 4, 8, 16, 64, 256)

MEASURED_ON = {
    "AMX": "one core of an Emerald Rapids server CPU (AMX, AVX512), 2048 x 2048, torch 2.13, numba 0.68",
    "AVX512": "the same with oneDNN held to AVX512-BF16 instructions (no AMX)",
}

# class of CPU -> what most of a model's weights are -> rows up to which a decoding step runs in compiled loops
# (`python -m trine.benchmarks.cpu_decode --ways`).
STEP_ROWS = {
    "AMX": dict.fromkeys(("float32", "bfloat16", "int8 by float32", "lanes", "int8", "int8 by int8", "int4"), 8),
    "AVX512": dict.fromkeys(("float32", "bfloat16", "int8 by float32", "lanes", "int8", "int8 by int8", "int4"), 8),
}

# class of CPU -> kind -> path -> speeds at ROWS.
SPEEDS: dict[str, dict[str, dict[str, tuple[float, ...]]]] = {
    "AMX": {
        "bfloat16": {
            "torch": (1.02, 1.06, 0.99, 1.01, 1.01, 0.96, 1.13),
            "packed": (1.22, 0.75, 0.61, 0.68, 0.66, 0.88, 1.17),
            "loops": (0.96, 0.99, 0.82, 0.57, 0.26, 0.0, 0.0),
        },
        "float32": {
            "torch": (0.83, 0.84, 0.39, 0.3, 0.34, 0.39, 0.42),
            "packed": (0.79, 0.64, 0.55, 0.51, 0.41, 0.44, 0.42),
            "loops": (0.59, 0.7, 0.55, 0.45, 0.25, 0.0, 0.0),
        },
        "int8 by bfloat16": {
            "torch": (0.19, 0.06, 0.05, 0.05, 0.05, 0.08, 0.11),
            "int8pack": (1.64, 1.26, 1.38, 0.69, 0.36, 0.0, 0.0),
            "loops": (2.39, 1.54, 1.68, 0.63, 0.28, 0.0, 0.0),
        },
        "int8 by float32": {
            "torch": (0.21, 0.06, 0.04, 0.04, 0.05, 0.1, 0.16),
            "loops": (2.51, 1.74, 1.43, 0.55, 0.28, 0.0, 0.0),
        },
        "int8 by int8": {
            "torch": (1.68, 1.7, 1.77, 1.52, 1.42, 1.56, 1.16),
            "packed": (2.0, 1.71, 2.11, 1.02, 1.07, 2.09, 1.81),
            "loops": (1.59, 1.0, 0.61, 0.24, 0.14, 0.0, 0.0),
        },
        "4 bits by bfloat16": {
            "loops": (3.55, 2.66, 1.81, 0.94, 0.56, 0.0, 0.0),
            "pieces": (0.4, 0.32, 0.36, 0.3, 0.33, 0.49, 0.46),
            "torch": (0.09, 0.08, 0.08, 0.07, 0.08, 0.11, 0.2),
            "int4pack": (3.75, 2.94, 2.01, 0.82, 0.5, 0.0, 0.0),
            "tiles": (1.7, 1.72, 2.27, 1.48, 1.47, 1.0, 0.6),
            "slabs": (0.0, 0.0, 0.0, 0.0, 0.68, 0.99, 0.92),
        },
        "4 bits by float32": {
            "loops": (3.43, 2.72, 2.14, 1.02, 0.58, 0.0, 0.0),
            "pieces": (0.31, 0.25, 0.32, 0.2, 0.21, 0.26, 0.19),
            "torch": (0.09, 0.09, 0.09, 0.09, 0.08, 0.11, 0.15),
        },
        "8 bits by bfloat16": {
            "loops": (1.65, 1.69, 1.5, 0.84, 0.53, 0.0, 0.0),
            "pieces": (0.31, 0.36, 0.34, 0.27, 0.28, 0.41, 0.48),
            "torch": (0.14, 0.13, 0.13, 0.13, 0.14, 0.17, 0.27),
            "int8pack": (1.39, 1.52, 1.02, 0.58, 0.39, 0.0, 0.0),
            "tiles": (1.13, 1.47, 1.2, 1.16, 1.26, 1.04, 0.61),
            "slabs": (0.0, 0.0, 0.0, 0.0, 0.0, 1.03, 0.89),
        },
        "8 bits by float32": {
            "loops": (1.82, 1.68, 1.74, 0.88, 0.56, 0.0, 0.0),
            "pieces": (0.29, 0.21, 0.23, 0.2, 0.21, 0.27, 0.17),
            "torch": (0.19, 0.17, 0.17, 0.14, 0.16, 0.21, 0.16),
        },
    },
    "AVX512": {
        "bfloat16": {
            "torch": (1.02, 1.05, 1.06, 1.01, 1.0, 1.01, 1.0),
            "packed": (2.15, 2.08, 1.88, 1.52, 1.43, 1.16, 1.03),
            "loops": (1.93, 1.92, 1.09, 0.43, 0.26, 0.0, 0.0),
        },
        "float32": {
            "torch": (0.66, 0.32, 0.33, 0.32, 0.3, 0.25, 0.23),
            "packed": (0.85, 0.53, 0.55, 0.53, 0.53, 0.52, 0.51),
            "loops": (1.01, 0.92, 0.72, 0.3, 0.23, 0.0, 0.0),
        },
        "int8 by bfloat16": {
            "torch": (0.26, 0.03, 0.19, 0.2, 0.21, 0.2, 0.13),
            "int8pack": (2.15, 2.04, 1.94, 1.18, 0.79, 0.0, 0.0),
            "loops": (3.9, 2.94, 1.68, 0.66, 0.32, 0.0, 0.0),
        },
        "int8 by float32": {
            "torch": (0.27, 0.03, 0.19, 0.21, 0.2, 0.21, 0.13),
            "loops": (4.16, 2.75, 1.44, 0.65, 0.32, 0.0, 0.0),
        },
        "int8 by int8": {
            "torch": (3.58, 1.15, 1.12, 1.13, 1.25, 1.59, 1.76),
            "packed": (3.53, 3.29, 3.0, 2.7, 2.6, 2.11, 1.95),
            "loops": (3.4, 3.35, 3.34, 2.7, 2.17, 1.85, 1.73),
        },
        "4 bits by bfloat16": {
            "loops": (5.43, 3.34, 1.79, 1.6, 1.04, 0.0, 0.0),
            "pieces": (0.8, 0.73, 0.74, 0.73, 0.83, 0.88, 0.93),
            "torch": (0.19, 0.19, 0.18, 0.19, 0.23, 0.39, 0.65),
            "int4pack": (4.26, 3.45, 2.45, 1.3, 0.83, 0.0, 0.0),
            "planes": (2.9, 2.9, 2.9, 2.3, 1.87, 1.15, 0.97),
        },
        "4 bits by float32": {
            "loops": (6.01, 3.4, 1.76, 1.61, 1.05, 0.0, 0.0),
            "pieces": (0.59, 0.48, 0.33, 0.3, 0.28, 0.24, 0.22),
            "torch": (0.23, 0.2, 0.18, 0.18, 0.17, 0.2, 0.2),
            "planes": (2.9, 2.9, 2.1, 1.5, 1.06, 0.6, 0.49),
        },
        "8 bits by bfloat16": {
            "loops": (3.71, 2.76, 1.75, 1.62, 1.07, 0.0, 0.0),
            "pieces": (0.73, 0.67, 0.68, 0.7, 0.78, 0.87, 0.94),
            "torch": (0.44, 0.42, 0.43, 0.44, 0.54, 0.69, 0.87),
            "int8pack": (2.16, 1.98, 1.76, 1.13, 0.77, 0.0, 0.0),
            "planes": (2.6, 2.6, 2.6, 2.2, 1.75, 1.15, 0.97),
        },
        "8 bits by float32": {
            "loops": (3.86, 2.82, 1.69, 1.65, 1.06, 0.0, 0.0),
            "pieces": (0.56, 0.47, 0.32, 0.3, 0.28, 0.24, 0.22),
            "torch": (0.72, 0.57, 0.43, 0.36, 0.31, 0.25, 0.22),
            "planes": (2.6, 2.6, 2.0, 1.5, 1.06, 0.6, 0.49),
        },
    },
}
