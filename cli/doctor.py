"""`trine doctor`: what this machine is, what Trine will use on it, and why."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from trine.cli.options import Device


def doctor(
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the tables.")] = False,
) -> None:
    """Show hardware, versions, and the device, dtype and kernels that will be used, each with the reason."""
    findings = examine(device)
    print(json.dumps(findings) if as_json else render(findings))


def examine(device_name: str) -> dict[str, Any]:
    """Everything `trine doctor` says, as plain JSON values. Times two short matrix products for the peaks."""
    import torch

    from trine.engine import env
    from trine.engine.train.energy_counters import find_counters
    from trine.kernels.hardware import peak_flops
    from trine.kernels.implementations import implementations, products_on_cpu

    device, device_reason = env.choose_device(device_name), env.why_device(device_name)
    dtype, dtype_reason = env.choose_dtype(device)
    threads, threads_reason = env.set_threads(0), env.why_threads()
    measured_on, products = products_on_cpu() if device.type == "cpu" else ("", ())
    counters = find_counters(device)
    peaks = []
    for peak_dtype in (torch.bfloat16, torch.float32):
        peak, source = peak_flops(device, peak_dtype)
        peaks.append({"dtype": _name(peak_dtype), "flops": peak, "source": source})
    return {
        "environment": env.environment(device),
        "load": env.load_average(),
        "memory_available_bytes": env.available_memory(),
        "gpus": env.gpus(),
        "energy": {"counted": [counter.name for counter in counters.found], "uncounted": counters.uncounted},
        "device": {"value": str(device), "reason": device_reason},
        "compute_dtype": {"value": _name(dtype), "reason": dtype_reason},
        "threads": {"value": threads, "reason": threads_reason},
        "peaks": peaks,
        "kernels": [
            {"operation": row.operation, "implementation": row.implementation, "reason": row.reason}
            for row in implementations(device, dtype)
        ],
        "products_measured_on": measured_on,
        "products": [
            {
                "kind": row.kind,
                "first": row.first,
                "last": row.last,
                "path": row.path,
                "speeds": row.speeds,
                "reason": row.reason,
            }
            for row in products
        ],
    }


def render(findings: dict[str, Any]) -> str:
    """The findings as aligned text, one fact a line."""
    from trine.engine.log import format_bytes

    about = findings["environment"]
    load = ", ".join(f"{number:.2f}" for number in findings["load"])
    busy = "; busy: timings taken now will be low" if findings["load"][0] > 0.5 * about["cpu_cores"] else ""
    memory = f"{format_bytes(about['memory_bytes'])}, {format_bytes(findings['memory_available_bytes'])} available"
    energy = findings["energy"]
    counters = f"counted of {', '.join(energy['counted'])}" if energy["counted"] else "unknown"
    hardware = [
        ("cpu", f"{about['cpu_name']}, {about['cpu_cores']} cores"),
        ("memory", memory),
        ("load", f"{load} (1, 5, 15 minutes){busy}"),
        ("energy", "; ".join([counters, *energy["uncounted"]])),
        *((gpu["device"], f"{gpu['name']}, {format_bytes(gpu['memory_bytes'])}") for gpu in findings["gpus"]),
    ]
    versions = [
        ("trine", about["trine"] or "not installed, run from source"),
        ("commit", about["commit"] or "none: not a git checkout"),
        ("python", f"{about['python']} on {about['platform']}"),
        *about["packages"].items(),
    ]
    choices = [
        (label, f"{findings[key]['value']}  ({findings[key]['reason']})")
        for label, key in (("device", "device"), ("compute dtype", "compute_dtype"), ("threads", "threads"))
    ]
    choices += [
        (f"peak {row['dtype']}", f"{row['flops'] / 1e12:.3g} TFLOP/s  ({row['source']})") for row in findings["peaks"]
    ]
    kernels = findings["kernels"]
    width = max(len(row["implementation"]) for row in kernels)
    rows = [(row["operation"], f"{row['implementation']:<{width}}  {row['reason']}") for row in kernels]
    tables = [("Hardware", hardware), ("Versions", versions), ("Choices", choices), ("Kernels", rows)]
    if findings["products"]:
        title = (
            "Products by number of rows (speed against plain bf16)\n  measured on " + findings["products_measured_on"]
        )
        tables.append((title, [(row["kind"], _product(row)) for row in findings["products"]]))
    lines = []
    for title, table in tables:
        lines += [title, *(f"  {label:<21} {text}" for label, text in table), ""]
    return "\n".join(lines).rstrip()


def _product(row: dict[str, Any]) -> str:
    """One line of the table of products: rows, path, its speeds at the least and most of them, reason."""
    last = "and more" if row["last"] is None else f"to {row['last']}"
    number = f"{row['first']}" if row["first"] == row["last"] else f"{row['first']} {last}"
    speeds = [f"{speed:.2g}x" for speed in (row["speeds"][0], row["speeds"][-1])]
    return f"{number:<12} {row['path']:<9} {' to '.join(dict.fromkeys(speeds)):<14} {row['reason']}"


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
