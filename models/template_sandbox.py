"""jinja2 for templates that come with a model: sandboxed, and paid for out of a budget.

The sandbox keeps a template away from Python. What it would still let through is a template that
takes for ever or fills the memory, so each turn of a loop, call, filter and text that is joined or
printed is charged for its size. The bounds are generous for honest templates and no proof against
a determined author; they turn what goes wrong by accident or in jest into an error.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import wraps
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_WORK = 1 << 28
"""Characters and items handled in one rendering; a loop's turn or a call counts as `TURN`."""
TURN = 256
MAX_LENGTH = 1 << 24
"""Characters of one text, items of one list, and the largest number a filter may be given."""
MAX_INTEGER_BITS = 256
WIDE = re.compile(r"[%{][^%{}\s]*\d{6}")
"""A format that pads to 100,000 characters or more."""
FAILURES = (
    *(TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
    *(RuntimeError, MemoryError, AssertionError, SyntaxError),
)
"""What rendering somebody's template may raise."""


class Refused(TemplateError):
    """The template itself called `raise_exception`."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that transformers renders chat templates in, with a budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
        )
        self._left = MAX_WORK
        self.filters["tojson"] = _tojson
        self.filters = {name: self._guarded(each) for name, each in self.filters.items()}
        self.filters |= {"_turns": self._turns, "_measured": self._measured}
        self.globals["raise_exception"] = _refuse
        del self.globals["lipsum"]  # makes up texts of any length, in no conversation's interest

    def load(self, source: str) -> Template:
        """Compile a template, with its loops and texts tied to the budget. Raises `FAILURES`."""
        tree = self.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, "_turns")
        for concat in list(tree.find_all(nodes.Concat)):
            inner = nodes.Concat(concat.nodes, lineno=concat.lineno)
            concat.nodes = [_filtered(inner, "_measured")]
        for output in list(tree.find_all(nodes.Output)):
            output.nodes = [
                one if isinstance(one, nodes.TemplateData) else _filtered(one, "_measured")
                for one in output.nodes
            ]
        tree.set_environment(self)
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None))

    def render(self, template: Template, variables: dict[str, Any]) -> str:
        """Render with a fresh budget, one rendering at a time. Raises `FAILURES`."""
        self._left = MAX_WORK
        pieces, length = [], 0
        for piece in template.generate(variables):
            length += len(piece)
            if length > MAX_LENGTH:
                raise SecurityError(f"the text grows beyond {MAX_LENGTH} characters")
            pieces.append(piece)
        return "".join(pieces)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call something for the template."""
        method = getattr(__obj, "__wrapped__", __obj)  # jinja wraps format and format_map
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            __self._check_text_call(method.__name__, owner, (*args, *kwargs.values()))
        __self._check_numbers((*args, *kwargs.values()))
        return __self._measured(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator whose result can be much larger than its operands."""
        numbers = isinstance(left, int) and isinstance(right, int)
        if numbers and operator in ("*", "**"):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1)
            if bits + right.bit_length() > MAX_INTEGER_BITS:
                raise SecurityError("a number grows too large")
        elif operator == "*":
            times, what = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and times > 0:
                self._charge(_weight(what) * times)
        elif operator == "+" and isinstance(left, list) and isinstance(right, list):
            self._charge(TURN * (len(left) + len(right)))
            self._charge(_weight(left) + _weight(right))
        elif operator == "%" and isinstance(left, str):
            self._check_text_call("format", left, (right,))
        return self._measured(super().call_binop(context, operator, left, right))

    def _charge(self, work: int) -> None:
        self._left -= work
        if work > MAX_LENGTH or self._left < 0:
            raise SecurityError("it computes too much")

    def _measured(self, value: Any) -> Any:
        """Return the value, after charging for it."""
        self._charge(TURN + (len(value) if isinstance(value, str | list | tuple | dict) else 0))
        return value

    def _turns(self, values: Iterable[Any]) -> Iterable[Any]:
        """Return what a loop goes over: as it is where its length is known, else counted."""
        if isinstance(values, Sized):
            self._charge(TURN * len(values))
            return values
        return self._counted(values)

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._charge(TURN)
            yield value

    def _guarded(self, filtering: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that is charged for its result; jinja's marks on it stay."""

        @wraps(filtering)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self._check_numbers((*args[1:], *kwargs.values()))
            for items in (one for one in args if isinstance(one, list | tuple)):
                self._charge(_weight(items))
            # In front of what is filtered, jinja may have put its environment.
            first = next((i for i, one in enumerate(args) if isinstance(one, str)), None)
            if first is not None:
                name, others = filtering.__name__.removeprefix("do_"), args[first + 1 :]
                self._check_text_call(name, args[first], (*others, *kwargs.values()))
            return self._measured(filtering(*args, **kwargs))

        return guarded

    def _check_text_call(self, name: str, text: str, args: Iterable[Any]) -> None:
        """Charge for what a method of a text, or the filter of that name, could make of it."""
        if name == "translate":
            raise SecurityError("it translates a text")
        if name in ("format", "format_map"):
            _check_format(text)
            self._charge((text.count("{") + text.count("%")) * _weight(list(args)))
        elif name == "wordwrap":
            self._charge(len(text) * max((len(a) for a in args if isinstance(a, str)), default=1))
        elif name in ("replace", "join", "expandtabs", "indent"):
            sizes = [len(one) if isinstance(one, Sized) else one for one in args]
            self._charge(len(text) * max((one for one in sizes if isinstance(one, int)), default=1))

    @staticmethod
    def _check_numbers(values: Iterable[Any]) -> None:
        if any(isinstance(one, int) and abs(one) > MAX_LENGTH for one in values):
            raise SecurityError("it asks for too much of something")


class GenerationTag(Extension):
    """`{% generation %}` marks the model's own words for training; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse up to `{% endgeneration %}`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _weight(value: object) -> int:
    """Return how long a value is as text, about; texts in lists and dictionaries count."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return 1 + sum(map(_weight, value)) if isinstance(value, list | tuple) else 1


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _check_format(text: str) -> None:
    if WIDE.search(text):
        raise SecurityError("it asks for a very wide text")


def _refuse(message: object) -> None:
    raise Refused(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it: jinja's own filter would escape characters of HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
