"""Docstrings as this site shows them: what is reStructuredText in them becomes Markdown.

An extension of griffe, which reads the source for the reference; part of the build, not of the site.
"""

from __future__ import annotations

import re

import griffe

_ROLE = re.compile(r":(?:attr|class|func|meth|mod):`([\w.]+)`")
_TABLE = re.compile(r"^( *)=+ +=+[ =]*\n.*\n\1=+[ =]*$", re.MULTILINE | re.DOTALL)
_LITERAL = re.compile(r"::$", re.MULTILINE)
_DOOR = re.compile(r"^In: (.*?)\nOut: (.*?)\nMay import: .*", re.MULTILINE | re.DOTALL)


class MarkdownDocstrings(griffe.Extension):
    """Roles become links to what they name, tables and ``::`` what Markdown knows.

    Of a room's door, what goes in and out becomes a list. What it may import is for its maintainers.
    """

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs) -> None:
        self._rewrite(pkg, loader.modules_collection)

    def _rewrite(self, obj: griffe.Object, modules: griffe.ModulesCollection) -> None:
        if obj.docstring:
            text = _DOOR.sub(r"- In: \1\n- Out: \2", obj.docstring.value)
            text = _LITERAL.sub(":", text)
            text = _TABLE.sub(lambda table: f"{table[1]}```text\n{table[0]}\n{table[1]}```", text)
            obj.docstring.value = _ROLE.sub(lambda role: _link(obj, role[1], modules), text)
        for member in obj.members.values():
            if not member.is_alias:
                self._rewrite(member, modules)


def _link(obj: griffe.Object, name: str, modules: griffe.ModulesCollection) -> str:
    """A link to ``name`` as it is meant within ``obj``; a bare name if the site has no such target."""
    scopes, scope = [], obj
    while scope is not None:
        scopes.append(f"{scope.path}.{name}")
        scope = scope.parent
    for path in (*scopes, name):
        try:
            target = modules[path].canonical_path
        except (KeyError, griffe.GriffeError):
            continue
        return f'<autoref identifier="{target}" optional><code>{name.rpartition(".")[2]}</code></autoref>'
    return f"`{name}`"
