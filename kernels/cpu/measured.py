"""Speeds of products on a CPU by kind, path and number of rows, relative to plain bf16: the data of `table.py`.

Made by `python -m trine.benchmarks.cpu_quantized` (its results lie in `benchmarks/results/`), which says how they were
measured. 1 is a product of bf16 rows with a bf16 weight of the same shape by `torch.nn.functional.linear` (in the line
"torch" of that product it is not exactly 1: it ran against itself). 0: not measured, for it does every few rows anew,
or (slabs) is made for many. With AMX packed weights at 64 and 256 rows were measured anew with slabs, on a busier
machine, and codes by codes with loops that were slower than today's.
"""

from __future__ import annotations

ROWS = (1, 2, 4, 8, 16, 64, 256)

MEASURED_ON = {
    "AMX": "one core of an Emerald Rapids server CPU (AMX, AVX512), 2048 x 2048, torch 2.13, numba 0.68",
    "AVX512": "one core of a Zen 5 server CPU (AVX512-BF16, VNNI), 2048 x 2048, torch 2.13, numba 0.68",
}

# class of CPU -> what most of a model's weights are -> rows up to which a decoding step runs in compiled loops
# (`python -m trine.benchmarks.cpu_decode --ways`).
STEP_ROWS = {
    "AMX": {
        "float32": 8, "bfloat16": 8, "int8 by float32": 8, "float8": 8, "lanes": 8, "int8": 8,
        "int8 by int8": 8, "int4": 8,
    },
    "AVX512": {
        "float32": 8, "bfloat16": 8, "int8 by float32": 8, "float8": 16, "lanes": 16, "int8": 16,
        "int8 by int8": 16, "int4": 16,
    },
}  # fmt: skip

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
            "torch": (1.01, 1.01, 1.01, 1.0, 1.0, 1.0, 1.0),
            "packed": (2.12, 1.9, 1.9, 1.59, 1.45, 1.12, 1.03),
            "loops": (1.85, 1.5, 1.22, 0.42, 0.3, 0.0, 0.0),
        },
        "float32": {
            "torch": (0.66, 0.3, 0.35, 0.32, 0.29, 0.25, 0.23),
            "packed": (0.76, 0.55, 0.57, 0.57, 0.55, 0.52, 0.52),
            "loops": (1.05, 0.89, 0.68, 0.3, 0.23, 0.0, 0.0),
        },
        "int8 by bfloat16": {
            "torch": (0.04, 0.03, 0.03, 0.03, 0.04, 0.07, 0.21),
            "int8pack": (2.18, 1.99, 1.84, 1.15, 0.78, 0.0, 0.0),
            "loops": (3.74, 2.67, 1.62, 0.67, 0.34, 0.0, 0.0),
        },
        "int8 by float32": {
            "torch": (0.04, 0.03, 0.03, 0.03, 0.04, 0.07, 0.21),
            "loops": (3.99, 2.72, 1.69, 0.72, 0.35, 0.0, 0.0),
        },
        "int8 by int8": {
            "torch": (3.55, 1.14, 1.18, 1.17, 1.26, 1.53, 1.7),
            "packed": (3.42, 2.97, 3.08, 2.63, 2.44, 2.1, 1.89),
            "loops": (3.27, 3.07, 2.98, 3.5, 3.09, 1.94, 1.68),
        },
        "float8 by float8": {
            "loops": (3.56, 3.36, 2.76, 1.81, 1.22, 0.0, 0.0),
            "panels": (0.75, 0.68, 0.72, 0.8, 0.95, 1.0, 0.93),
            "pieces": (1.02, 0.96, 1.01, 1.0, 0.97, 0.74, 0.82),
            "torch": (0.95, 0.95, 0.98, 0.9, 0.95, 0.92, 0.88),
        },
        "float8 in blocks by float8": {
            "loops": (3.71, 3.57, 2.49, 1.5, 1.0, 0.0, 0.0),
            "panels": (0.72, 0.64, 0.67, 0.74, 0.9, 0.94, 0.91),
            "pieces": (0.99, 0.9, 0.91, 0.89, 0.85, 0.71, 0.81),
            "torch": (0.23, 0.23, 0.2, 0.16, 0.17, 0.17, 0.16),
        },
        "4 bits by bfloat16": {
            "loops": (5.87, 3.61, 2.01, 1.78, 1.08, 0.0, 0.0),
            "pieces": (0.86, 0.78, 0.84, 0.8, 0.83, 0.88, 0.91),
            "torch": (0.2, 0.18, 0.18, 0.2, 0.24, 0.39, 0.58),
            "planes": (3.3, 2.89, 3.07, 2.34, 1.82, 1.16, 0.94),
            "int4pack": (4.73, 3.54, 2.68, 1.45, 0.9, 0.0, 0.0),
        },
        "4 bits by float32": {
            "loops": (5.98, 3.51, 1.93, 1.74, 1.12, 0.0, 0.0),
            "pieces": (0.63, 0.48, 0.35, 0.31, 0.29, 0.25, 0.22),
            "torch": (0.24, 0.21, 0.18, 0.18, 0.19, 0.19, 0.2),
            "planes": (2.99, 2.83, 2.13, 1.4, 1.0, 0.62, 0.48),
        },
        "8 bits by bfloat16": {
            "loops": (3.57, 3.19, 1.85, 1.72, 1.09, 0.0, 0.0),
            "pieces": (0.74, 0.74, 0.74, 0.7, 0.79, 0.86, 0.91),
            "torch": (0.42, 0.47, 0.48, 0.44, 0.52, 0.67, 0.8),
            "planes": (2.7, 2.68, 2.6, 2.08, 1.64, 1.16, 0.95),
            "int8pack": (2.07, 2.1, 1.78, 1.14, 0.79, 0.0, 0.0),
        },
        "8 bits by float32": {
            "loops": (3.78, 2.87, 1.79, 1.74, 1.09, 0.0, 0.0),
            "pieces": (0.62, 0.46, 0.34, 0.31, 0.28, 0.24, 0.21),
            "torch": (0.85, 0.6, 0.45, 0.39, 0.34, 0.24, 0.21),
            "planes": (2.73, 2.53, 1.85, 1.34, 0.95, 0.56, 0.47),
        },
    },
}
