"""Checks of experimental kernels on a GPU, which let them be used where they pass (`verified.py`).

Every group of cases is a process of its own with a time limit, for a wrong barrier makes a GPU wait for ever. Groups
run in their order, small ones first, and one that fails ends the check. With `--verify`, if all groups pass, the pair
of this triton and this GPU is added to kernels/tuned/verified.json, and from then on the kernel is taken there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from trine.kernels.target import target_of
from trine.kernels.verified import mark_verified

TIME_LIMIT_SECONDS = 60


@dataclass(frozen=True)
class Checks:
    """The check of a kernel: `module` runs it as a program, `check` says what is wrong in a case, and what it noticed.

    Cases of a group have few kernels to compile, so that the time limit is one for running.
    """

    module: str
    operation: str
    groups: Mapping[str, Sequence[Any]]
    check: Callable[[Any], tuple[list[str], str]]

    def main(self, arguments: list[str] | None = None) -> int:
        """Parse the command line and run the groups; 0 if all passed."""
        parser = argparse.ArgumentParser(prog=f"python -m {self.module}")
        parser.add_argument(
            "--group", nargs="*", choices=list(self.groups), default=list(self.groups), help="default: all"
        )
        parser.add_argument("--verify", action="store_true", help="if all groups pass, let the kernel be used here")
        parser.add_argument("--in-process", action="store_true", help="without a time limit, in this process")
        options = parser.parse_args(arguments)
        if options.verify and (options.in_process or set(options.group) != set(self.groups)):
            parser.error("--verify needs all groups, in processes of their own")
        if options.in_process:
            return max((self._check_group(name) for name in options.group), default=0)
        for name in options.group:
            reason = self.run_group(name)
            if reason is not None:
                print(f"FAIL group {name!r}: {reason}")
                return 1
        if options.verify:
            gpu = target_of(torch.empty(0, device="cuda")).gpu
            mark_verified(self.operation, gpu)
            print(f"{self.operation} is verified on {gpu}")
        return 0

    def run_group(self, name: str) -> str | None:
        """Check a group in a process of its own; what went wrong, or None."""
        command = [sys.executable, "-m", self.module, "--in-process", "--group", name]
        try:
            done = subprocess.run(command, timeout=TIME_LIMIT_SECONDS, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired as error:
            return f"stopped after {TIME_LIMIT_SECONDS} s; until then: {error.stdout!r}"
        print(done.stdout, end="")
        return None if done.returncode == 0 else f"exit status {done.returncode}\n{done.stdout}{done.stderr[-2000:]}"

    def _check_group(self, name: str) -> int:
        """Check cases in this process and print a line for each; 1 if one failed."""
        failed = 0
        for case in self.groups[name]:
            problems, noticed = self.check(case)
            print(f"{'; '.join(problems) if problems else 'ok'}  {case}  {noticed}", flush=True)
            failed |= bool(problems)
        return failed


@contextmanager
def new_tensors_hold_nan() -> Iterator[None]:
    """Within this block memory of new tensors holds NaN, so that a result left unwritten is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
