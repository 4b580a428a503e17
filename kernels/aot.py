"""Compile every kernel ahead of time, without a GPU, and check what came out.

    python -m trine.kernels.aot [--operations NAME,...] [--only TEXT] [--targets sm_80,sm_90,sm_100,gfx942] [--jobs N]
                                [--write | --check | --show]

What is compiled is what a GPU would run: the operations' `samples()` are launched on tensors without memory, with the
configurations that they pick for each target, and every recorded launch is compiled with its own argument types,
divisible by 16 where the sizes are. The table shows shared memory, registers, stack (spilled registers) and the
matrix instructions. Limits: shared memory within the target's; no stack on sm_80 and sm_90 and no spilled registers on
gfx942; in samples of half-precision matrix products tensor-core instructions everywhere, and asynchronous copies on
sm_80; in warp-specialized samples more warps than were asked for, registers that move between them, and wgmma
instructions that ptxas has not made wait for one another.

`aot.json` keeps the table, each row with a hash of the kernel's source and launch. `--write` compiles everything and
rewrites it; `--check` compiles what changed since, and a fixed part of the rest, and compares.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor as PlainDescriptor

from trine.kernels.gluon_names import TensorDescriptor
from trine.kernels.hardware import INTERPRETING
from trine.kernels.launch import Launch, recording
from trine.kernels.samples import OPERATIONS, Sample, all_samples
from trine.kernels.target import COMPILED

TABLE = Path(__file__).parent / "aot.json"
# Of the rows that did not change, `--check` compiles one in this many, always the same ones.
_SAMPLED = 40
_GPU_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}


@dataclass(frozen=True)
class Job:
    """One launch of a sample on a target."""

    sample: Sample
    target: str
    index: int
    launch: Launch

    @property
    def key(self) -> str:
        return f"{self.sample.label} | {self.launch.kernel.__name__} {self.index} | {self.target}"


@dataclass(frozen=True)
class Selection:
    """Which launches: of these operations, of samples whose name contains `only`, on these targets."""

    operations: tuple[str, ...] = OPERATIONS
    only: str = ""
    targets: tuple[str, ...] = tuple(COMPILED)


def jobs(selection: Selection) -> Iterator[Job]:
    """Every launch of the selected samples on every target they are meant for."""
    for sample in all_samples(selection.operations):
        if selection.only not in sample.label:
            continue
        for target in selection.targets:
            if sample.targets and target not in sample.targets:
                continue
            with recording(COMPILED[target]) as launches:
                sample.call()
            for index, launch in enumerate(launches):
                yield Job(sample, target, index, launch)


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Signature, constants and attributes of a launch, as Triton's own just-in-time compiler derives them."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for place, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments.get(name, parameter.default)
        divisible, as_it_comes = False, parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not as_it_comes):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], divisible = "*" + _TYPES[value.dtype], True
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}[{block}],{value.layout!r}>"
        elif isinstance(value, PlainDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and not as_it_comes
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            raise TypeError(f"argument {name} of {launch.kernel.__name__} is a {type(value).__name__}")
        if divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def source_hash(job: Job) -> str:
    """A hash of everything that decides the machine code, but for the compiler's version."""
    signature, constants, attributes = specialised(job.launch)
    # A constant may be a data type or another kernel; its name says enough.
    values = {name: getattr(value, "__name__", str(value)) for name, value in constants.items()}
    parts = [signature, values, sorted(attributes), job.launch.config.num_warps, job.launch.config.num_stages]
    text = repr([*_sources(job.launch.kernel), parts, sorted(job.launch.options.items()), job.target])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@lru_cache(maxsize=256)
def _sources(kernel: Any) -> tuple[str, ...]:
    """The source of a kernel and of the jitted functions it calls, by name."""
    found = {kernel.__name__: kernel}
    pending = [kernel]
    while pending:
        function = pending.pop()
        for node in ast.walk(ast.parse(function.src)):
            if isinstance(node, ast.Name):
                callee = function.__globals__.get(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                callee = getattr(function.__globals__.get(node.value.id), node.attr, None)
            else:
                continue
            # Triton's own library is a matter of the compiler's version.
            own = isinstance(callee, JITFunction) and not str(callee.__module__).startswith("triton.")
            if own and callee.__name__ not in found:
                found[callee.__name__] = callee
                pending.append(callee)
    return tuple(function.src for _, function in sorted(found.items()))


def compile_job(job: Job) -> dict[str, Any]:
    """The row of the table for one launch; `error` says why there is none."""
    config = job.launch.config
    row: dict[str, Any] = {"key": job.key, "hash": source_hash(job), "config": config.as_json()}
    signature, constants, attributes = specialised(job.launch)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    gluon = getattr(job.launch.kernel, "is_gluon", lambda: False)()
    try:
        compiled = triton.compile(
            (GluonASTSource if gluon else ASTSource)(job.launch.kernel, signature, constants, attributes),
            target=_GPU_TARGETS[job.target],
            options={**options, **job.launch.options},
        )
    except Exception as error:  # whatever the compiler raises is the finding
        return {**row, "error": f"{type(error).__name__}: {str(error)[:300]}"}
    row["shared"] = compiled.metadata.shared
    row["warps"] = compiled.metadata.num_warps
    row |= _amd(compiled.asm["amdgcn"]) if job.target.startswith("gfx") else _nvidia(compiled.asm, job.target)
    if job.sample.warp_specialized:
        row["serialised"] = _serialised(compiled.asm["cubin"])
    row["problems"] = _problems(row, job)
    return row


def _serialised(cubin: bytes) -> bool:
    """Whether every wgmma is a group of its own, which is waited for before the next: ptxas saw a conflict."""
    products = [line for line in _cuobjdump(cubin, "--dump-sass").splitlines() if re.search("[HQI]GMMA", line)]
    return bool(products) and all("gsb" in line for line in products)


def _cuobjdump(cubin: bytes, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), what, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def _nvidia(asm: Mapping[str, Any], target: str) -> dict[str, Any]:
    output = _cuobjdump(asm["cubin"], "--dump-resource-usage")
    usage = re.search(r"REG:(\d+) STACK:(\d+)", output)
    assert usage is not None, output
    ptx = asm["ptx"]
    instruction = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}[target]
    return {
        "registers": int(usage[1]),
        "spills": int(usage[2]),
        "matrix": ptx.count(instruction),
        "async_copies": ptx.count("cp.async"),
        "setmaxnreg": ptx.count("setmaxnreg"),
    }


def _amd(code: str) -> dict[str, Any]:
    def count(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", code)
        return int(found[1]) if found else 0

    return {
        "registers": count("vgpr_count"),
        "spills": count("vgpr_spill_count") + count("sgpr_spill_count"),
        "matrix": code.count("v_mfma"),
        "async_copies": 0,
        "setmaxnreg": 0,
    }


def _problems(row: Mapping[str, Any], job: Job) -> list[str]:
    """Which limits a row breaks."""
    found = []
    limit = COMPILED[job.target].shared_bytes
    if row["shared"] > limit:
        found.append(f"{row['shared']} bytes of shared memory, more than {limit}")
    if row["spills"] and job.target != "sm_100":
        found.append(f"{row['spills']} bytes or registers spilled")
    # A sample of a matrix product may launch kernels without one beside it.
    product = job.sample.tensor_cores and any("dot(" in text or "mma" in text for text in _sources(job.launch.kernel))
    if product and not row["matrix"]:
        found.append("no tensor-core instruction")
    if product and job.target == "sm_80" and not row["async_copies"]:
        found.append("no asynchronous copy")
    # Warps with roles come on top of those that a launch asks for.
    if job.sample.warp_specialized and not (row["setmaxnreg"] and row["warps"] > job.launch.config.num_warps):
        found.append(f"not warp-specialized: {row['warps']} warps, {row['setmaxnreg']} changes of registers")
    if row.get("serialised"):
        found.append("wgmma instructions wait for one another")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, compile, print the table; 1 if a kernel does not compile or breaks a limit."""
    parser = argparse.ArgumentParser(prog="python -m trine.kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--operations", default=",".join(OPERATIONS), help="comma-separated (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="samples whose name contains TEXT")
    parser.add_argument("--targets", default=",".join(COMPILED), help="comma-separated (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="compile everything and rewrite aot.json")
    what.add_argument("--update", action="store_true", help="compile what changed since; rewrite aot.json")
    what.add_argument("--check", action="store_true", help="compile what changed and a fixed part; compare")
    what.add_argument("--show", action="store_true", help="print the table of aot.json, compile nothing")
    options = parser.parse_args(arguments)
    selection = Selection(tuple(options.operations.split(",")), options.only, tuple(options.targets.split(",")))
    for given, known in ((selection.operations, OPERATIONS), (selection.targets, tuple(COMPILED))):
        for name in given:
            if name not in known:
                parser.error(f"unknown name {name!r}; one of {', '.join(known)}")
    if (options.write or options.update or options.check) and selection != Selection():
        parser.error("--update, --write and --check are about everything; leave out the selection")
    if INTERPRETING:
        parser.error("TRITON_INTERPRET is set, so nothing can be compiled; unset it")
    if options.show:
        _print([row for row in _stored()["rows"].values() if selection.only in row["key"]])
        return 0
    wanted = list(jobs(selection))
    stored = _stored() if options.check or options.update else {"rows": {}}
    if options.update and stored.get("triton") not in ("", triton.__version__):
        parser.error(f"aot.json was made with triton {stored['triton']}, this is {triton.__version__}; use --write")
    rows = stored["rows"]
    if options.update:
        todo = [job for job in wanted if job.key not in rows or rows[job.key]["hash"] != source_hash(job)]
    else:
        todo = [job for job in wanted if not options.check or _must_compile(job, rows)]
    done = _compile_all([job.key for job in todo], selection, options.jobs)
    _print(done)
    bad = [row for row in done if row.get("error") or row.get("problems")]
    for row in bad:
        print(f"FAIL {row['key']}: {row.get('error') or '; '.join(row['problems'])}")
    status = 1 if bad else 0
    if options.check:
        status |= _compare(wanted, done, stored)
    if (options.write or options.update) and not bad:
        known = rows | {row["key"]: row for row in done}
        _store([known[job.key] for job in wanted])
    print(f"{len(done)} of {len(wanted)} launches compiled with triton {triton.__version__}, {len(bad)} bad")
    return status


def _stored() -> dict[str, Any]:
    """The committed table: the compiler's version, and the rows by key."""
    if not TABLE.is_file():
        return {"triton": "", "rows": {}}
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    table["rows"] = {key: {"key": key, **row} for key, row in table["rows"].items()}
    return table


def _store(rows: list[dict[str, Any]]) -> None:
    """Write the table, a line for each row, so that a change of one kernel is a change of its lines."""
    names = ("hash", "config", "shared", "registers", "spills", "matrix", "async_copies", "setmaxnreg", "warps")
    lines = [f"{json.dumps(row['key'])}: {json.dumps({name: row[name] for name in names})}" for row in rows]
    head = f'{{"triton": {json.dumps(triton.__version__)}, "rows": {{'
    TABLE.write_text(head + "\n" + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


def _must_compile(job: Job, rows: Mapping[str, Mapping[str, Any]]) -> bool:
    row = rows.get(job.key)
    sampled = int(hashlib.sha256(job.key.encode()).hexdigest(), 16) % _SAMPLED == 0
    return sampled or row is None or row["hash"] != source_hash(job)


def _compare(wanted: list[Job], done: list[dict[str, Any]], stored: Mapping[str, Any]) -> int:
    """Whether aot.json describes these kernels; says what differs."""
    rows = stored["rows"]
    stale = [row["key"] for row in done if rows.get(row["key"], {}).get("hash") != row["hash"]]
    gone = sorted(rows.keys() - {job.key for job in wanted})
    measured = ("shared", "registers", "spills", "matrix", "async_copies")
    different = [
        row["key"]
        for row in done
        if stored["triton"] == triton.__version__
        and row["key"] not in stale
        and any(rows[row["key"]].get(name) != row.get(name) for name in measured)
    ]
    for reason, keys in (("changed since", stale), ("no longer launched", gone), ("compiles differently", different)):
        if keys:
            print(f"FAIL aot.json: {len(keys)} rows {reason}, first {keys[0]}; run make aot")
    return 1 if stale or gone or different else 0


def _compile_all(keys: list[str], selection: Selection, processes: int) -> list[dict[str, Any]]:
    if processes < 2 or len(keys) < 2:
        return [_compile_key(key, selection) for key in keys]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile_key, keys, [selection] * len(keys)))


def _compile_key(key: str, selection: Selection) -> dict[str, Any]:
    return compile_job(_jobs_by_key(selection)[key])


@lru_cache(maxsize=1)
def _jobs_by_key(selection: Selection) -> dict[str, Job]:
    return {job.key: job for job in jobs(selection)}


def _print(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    width = max(len(row["key"]) for row in rows)
    print(f"{'sample | kernel | target':<{width}}  {'shared':>7} {'regs':>5} {'spill':>5} {'matrix':>6} {'async':>5}")
    for row in rows:
        if "error" not in row:
            numbers = f"{row['shared']:>7} {row['registers']:>5} {row['spills']:>5} {row['matrix']:>6}"
            print(f"{row['key']:<{width}}  {numbers} {row['async_copies']:>5}")


if __name__ == "__main__":
    sys.exit(main())
