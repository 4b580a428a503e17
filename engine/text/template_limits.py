"""A sandbox for templates that nobody has read: what they may reach, how long they may run, how much they may write.

Jinja's immutable sandbox keeps a template out of Python and away from changing what it is given. It does not bound time
or memory: three nested loops over `range(100000)` run for ever, `'a' * 10 ** 10` takes all memory. Here every text that
a template makes is charged to a budget before or as it is made, every turn of a loop and every call looks at the
processor time that the rendering has used, and operations whose result can be far larger than their operands are
measured first.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context

SECONDS = 2.0
TEXT = 1 << 24  # characters a template may make, besides
LARGEST_INPUT = 1 << 28  # characters of a conversation
TEXT_PER_INPUT = 256  # as many for each character it is given
_DIGITS = 4  # of the widths and precisions in a format
_BITS = 4096  # of a whole number
_COUNT = 10_000  # the largest number a filter is given
_WIDE = re.compile(rf"\d{{{_DIGITS + 1},}}|\*|\{{[^{{}}]*\{{")
# Filters that make text of their own accord, or search it by expressions that can take for ever.
_LEFT_OUT_FILTERS = ("urlize", "xmlattr", "filesizeformat", "pprint", "forceescape")
# Filters that look at the members of a list and make no text of them: only their number counts.
_CHOOSING_FILTERS = {
    "attr", "batch", "count", "d", "default", "first", "groupby", "items", "last", "length", "list", "map", "max",
    "min", "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "sum", "unique",
}  # fmt: skip
_LEFT_OUT_GLOBALS = ("lipsum",)


class LimitError(jinja2.TemplateError):
    """A template runs too long or makes too much text."""


class Budget:
    """What one rendering may use."""

    def __init__(self, given: object) -> None:
        self._end = time.thread_time() + SECONDS
        self._left = LARGEST_INPUT
        self._left = TEXT + TEXT_PER_INPUT * self.weigh(given)

    def spend(self, characters: int) -> None:
        """Take account of so many characters; raises `LimitError` where they are too many, or time is up."""
        self._left -= characters
        if self._left < 0:
            raise LimitError("it makes too much text")
        if time.thread_time() > self._end:
            raise LimitError(f"it takes more than {SECONDS:.0f} seconds")

    def weigh(self, value: object) -> int:
        """About how many characters the text of a value has; containers are looked into, and that is charged too."""
        total, waiting = 0, [value]
        while waiting:
            item = waiting.pop()
            total += len(item) if isinstance(item, (str, bytes)) else 8
            if isinstance(item, Mapping):
                waiting.extend(item.keys())
                waiting.extend(item.values())
            elif isinstance(item, (list, tuple, set, frozenset)):
                waiting.extend(item)
            if total > self._left:
                raise LimitError("it makes too much text")
        return total


_budget: ContextVar[Budget] = ContextVar("budget")


def with_budget(budget: Budget, action: Callable[[], str]) -> str:
    """Run `action` (a rendering) with a budget."""
    token = _budget.set(budget)
    try:
        return action()
    finally:
        _budget.reset(token)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox; see the module. Renderings need `with_budget`."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, *, to_json: Callable[..., str], **options: Any) -> None:
        # Nothing is computed while a template is compiled: there, no budget would stop it.
        super().__init__(optimized=False, finalize=_finalize, **options)
        self.code_generator_class = _Generator
        for name in _LEFT_OUT_FILTERS:
            del self.filters[name]
        for name in _LEFT_OUT_GLOBALS:
            del self.globals[name]
        self.filters["tojson"] = to_json
        self.filters = {name: _limited(name, call) for name, call in self.filters.items()}
        self.globals.update(namespace=_Namespace, dict=_plain_dict)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            assert isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock))
            written = sum(len(data.data) for part in node.body for data in _template_data(part))
            tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [nodes.Const(written)], [], None, None)
            node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno).set_environment(self))
        return tree

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """An attribute that leads into Python: refused at once, whatever the template would do with it."""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} is unsafe")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` and `format_map`, which the sandbox replaces by its own."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None

        def measured(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__)
            _budget.get().spend(len(value.__self__) + sum(map(_budget.get().weigh, (args, kwargs))))
            return str(inner(*args, **kwargs))

        return measured

    def tick(self, written: int) -> None:
        """One more turn of a loop or call of a macro, whose own text is so long."""
        _budget.get().spend(written)

    def joined(self, parts: Iterable[Any]) -> str:
        """The operator `~`."""
        parts = list(parts)
        _budget.get().spend(sum(map(_budget.get().weigh, parts)))
        return "".join(map(str, parts))

    def made(self, value: Any) -> Any:
        """A list, tuple or dictionary that is written out. Charged whole: lists of lists double as texts do."""
        _budget.get().spend(_budget.get().weigh(value))
        return value

    def sliced(self, value: Any, part: slice) -> Any:
        """`value[a:b:c]`."""
        found = value[part]
        _spend_size(found)
        return found

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Every call in a template; the first names cannot be those of keyword arguments."""
        _measure_method(__obj, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        _spend_size(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators that can make much of little."""
        if operator == "+" and _sized(left) and _sized(right):
            _budget.get().spend(len(left) + len(right))
        elif operator == "%" and isinstance(left, (str, bytes)):
            _check_format(str(left))
            _budget.get().spend(len(left) + _budget.get().weigh(right))
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
        elif operator == "*" and (_sized(left) or _sized(right)):
            many, count = (left, right) if _sized(left) else (right, left)
            _budget.get().spend(len(many) * max(int(count), 0))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(max(left.bit_length(), 1) * max(right, 1))
        return super().call_binop(context, operator, left, right)


class _Generator(CodeGenerator):
    """Sends the operations that Jinja compiles to plain Python through the environment."""

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self.write("environment.made(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self.write("environment.made(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx != "load":  # the targets of a loop or a set
            super().visit_Tuple(node, frame)
            return
        self.write("environment.made(")
        super().visit_Tuple(node, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.sliced(")
        self.visit(node.node, frame)
        self.write(", slice(")
        for bound in (node.arg.start, node.arg.stop, node.arg.step):
            if bound is None:
                self.write("None")
            else:
                self.visit(bound, frame)
            self.write(", ")
        self.write("))")


class _Namespace(Namespace):
    """`namespace()` without names that lead into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"access to {name!r} of a namespace is unsafe")


def _plain_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    made = dict(*args, **kwargs)
    _budget.get().spend(_budget.get().weigh(made))
    return made


@pass_context
def _finalize(_: Context, value: Any) -> Any:
    """What is written out: its length is charged. (The context keeps Jinja from doing it while compiling.)"""
    budget = _budget.get()
    budget.spend(budget.weigh(value))
    return value


def _template_data(node: nodes.Node) -> Iterable[nodes.TemplateData]:
    return [node] if isinstance(node, nodes.TemplateData) else node.find_all(nodes.TemplateData)


def _limited(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments and result are measured."""

    @wraps(call)
    def measured(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        values = [value for value in (*args, *kwargs.values()) if not isinstance(value, (Context, jinja2.Environment))]
        weights = [_size(value) if name in _CHOOSING_FILTERS else budget.weigh(value) for value in values]
        budget.spend(sum(weights))
        for value in values[1:]:
            if isinstance(value, int) and abs(value) > _COUNT:
                raise LimitError(f"{value} is too much for the filter {name!r}")
        numbers = [value for value in values[1:] if isinstance(value, int)]
        texts = [value for value in values if isinstance(value, str)]
        if name == "format":
            _check_format(texts[0] if texts else "")
        elif name == "replace" and len(texts) >= 3:
            budget.spend((texts[0].count(texts[1]) + 1) * len(texts[2]))
        elif name in ("indent", "wordwrap", "join"):
            pieces = texts[0].count("\n") + 1 if name == "indent" and texts else sum(weights[:1])
            width = max([*numbers, *(len(text) for text in texts[1:])], default=0)
            budget.spend(pieces * (4 if name == "wordwrap" and len(texts) < 2 else width) if pieces else 0)
        elif name == "tojson":
            budget.spend(sum(weights[:1]) * (1 + 8 * max(numbers, default=0) + sum(weights[1:])))
        result = call(*args, **kwargs)
        _spend_size(result)
        return result

    return measured


def _measure_method(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Charge methods of text that multiply what they are given, before they are called."""
    budget = _budget.get()
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if not isinstance(owner, (str, bytes)):
        return
    numbers = [value for value in (*args, *kwargs.values()) if isinstance(value, int)]
    if name in ("center", "ljust", "rjust", "zfill"):
        budget.spend(max(numbers, default=0))
    elif name == "expandtabs":
        budget.spend(len(owner) * max([8, *numbers]))
    elif name == "replace" and len(args) >= 2 and all(isinstance(value, type(owner)) for value in args[:2]):
        budget.spend((owner.count(args[0]) + 1) * len(args[1]) + len(owner))
    elif name == "join" and args:
        values = list(args[0])
        budget.spend(sum(map(budget.weigh, values)) + len(owner) * len(values))
    elif name == "translate":
        budget.spend(len(owner) * (1 + budget.weigh(args)))


def _check_format(text: str) -> None:
    if _WIDE.search(text):
        raise LimitError(f"widths in a format may have {_DIGITS} digits and come from nowhere else")
    _budget.get().spend(sum(map(int, re.findall(r"\d+", text))))


def _check_bits(bits: int) -> None:
    if bits > _BITS:
        raise LimitError(f"a whole number of more than {_BITS} bits")


def _sized(value: object) -> bool:
    return isinstance(value, (str, bytes, list, tuple))


def _spend_size(value: Any) -> None:
    _budget.get().spend(_size(value))


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict, set)) else 1
