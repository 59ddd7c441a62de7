"""The mutants of a file: mutmut's operators, and four that take away what a statement does.

mutmut's own runner is not used: it puts the root of the repository on the path, where ``kernels/`` passes for Hugging
Face's package of that name, and it leaves out what is decorated, properties among it.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_string

#: Calls whose arguments are no subject: of types, which pyright checks, or of an error, whose words test_docs.py has.
_LEFT_ALONE = {"len", "isinstance", "cast"}
_OF_WORDS = {"ProConError", "warn"}


@dataclass(frozen=True)
class Mutant:
    """One change of ``file``: in ``function``, lines ``before`` became ``after``; ``number`` tells equal ones apart."""

    file: str
    function: str
    before: str
    after: str
    number: int
    line: int
    source: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.function, self.before, self.after, self.number


class _Changes(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[cst.CSTNode, cst.CSTNode, str, int]] = []
        self._names: list[str] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom, cst.TypeAlias)):
            return False
        if isinstance(node, cst.ClassDef | cst.FunctionDef):
            if any(_called(decorator.decorator) == "overload" for decorator in node.decorators):
                return False
            if isinstance(node, cst.ClassDef) and any(_called(base.value) == "Protocol" for base in node.bases):
                return False
            self._names.append(node.name.value)
        if isinstance(node, cst.Assign) and _is_declaration(node):
            return False
        if isinstance(node, cst.Call) and _called(node.func) in _LEFT_ALONE:
            return False
        for new in self._mutated(node):
            self.found.append((node, new, ".".join(self._names), self.get_metadata(PositionProvider, node).start.line))
        return not (isinstance(node, cst.Call) and _called(node.func) in _OF_WORDS)

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if isinstance(original_node, cst.ClassDef | cst.FunctionDef) and self._names:
            self._names.pop()

    def _mutated(self, node: cst.CSTNode) -> Iterator[cst.CSTNode]:
        if isinstance(node, cst.Call) and _called(node.func) in _OF_WORDS:
            return
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                changes = operator(node)
                # Of a text one change is enough: other words, or another case, are compared in the same way.
                yield from list(changes)[:1] if operator is operator_string else changes
        if isinstance(node, cst.Expr) and isinstance(node.value, cst.Call):
            yield cst.Pass()
        if isinstance(node, cst.Raise):
            yield cst.Pass()
        if isinstance(node, cst.If | cst.While) and not isinstance(node.test, cst.Comparison):
            yield node.with_changes(test=_negated(node.test))
        if isinstance(node, cst.Return) and node.value is not None and not _is_none(node.value):
            yield node.with_changes(value=cst.Name("None"))


def mutants(file: str, code: str) -> list[Mutant]:
    """All that compile and differ from ``code``, in the order of its lines."""
    wrapper = MetadataWrapper(cst.parse_module(code), unsafe_skip_copy=True)
    changes = _Changes()
    wrapper.visit(changes)
    same, seen, found = {ast.dump(ast.parse(code))}, Counter(), []
    for old, new, function, line in changes.found:
        source = wrapper.module.deep_replace(old, new).code
        try:
            tree = ast.parse(source)
            compile(tree, file, "exec")
        except SyntaxError:
            continue
        if (meaning := ast.dump(tree)) in same:
            continue
        same.add(meaning)
        before, after = _difference(code, source)
        seen[function, before, after] += 1
        found.append(Mutant(file, function, before, after, seen[function, before, after], line, source))
    return sorted(found, key=lambda mutant: mutant.line)


def _difference(old: str, new: str) -> tuple[str, str]:
    """The lines that changed, without indentation."""
    before, after = old.splitlines(), new.splitlines()
    while before and after and before[0] == after[0]:
        del before[0], after[0]
    while before and after and before[-1] == after[-1]:
        del before[-1], after[-1]
    return "\n".join(map(str.strip, before)), "\n".join(map(str.strip, after))


def _called(node: cst.BaseExpression) -> str:
    """The last name of ``a.b.name``."""
    if isinstance(node, cst.Attribute):
        return node.attr.value
    return node.value if isinstance(node, cst.Name) else ""


def _is_declaration(node: cst.Assign) -> bool:
    """``__all__ = ...``, or a type variable."""
    of_type = isinstance(node.value, cst.Call) and _called(node.value.func).startswith("TypeVar")
    return of_type or _called(node.targets[0].target) == "__all__"


def _is_none(node: cst.BaseExpression) -> bool:
    return _called(node) == "None"


def _negated(test: cst.BaseExpression) -> cst.BaseExpression:
    if isinstance(test, cst.UnaryOperation) and isinstance(test.operator, cst.Not):
        return test.expression
    return cst.UnaryOperation(cst.Not(), test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()]))
