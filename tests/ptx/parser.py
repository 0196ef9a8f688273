"""PTX text to instructions with resolved operands.

Only what is on a list here is read; anything else raises with its line, for a directive passed over may have mattered.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

WIDTHS = {"pred": 0, "b8": 8, "b16": 16, "b32": 32, "b64": 64}  # bits of a register or parameter, by its untyped name
_UNTYPED = {"f": "b", "u": "b", "s": "b", "b": "b"}
_IGNORED = ("loc", "pragma")  # what a debugger or an optimiser reads
_HEADER = ("version", "target", "address_size", "file", "section", "global", "extern", "visible")
_SPECIAL = re.compile(r"%(?:(?:tid|ntid|ctaid|nctaid)\.[xyz]|laneid|warpid)$")
_NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]$")
_GUARD = re.compile(r"@(!?)\s*(%[\w$]+)\s+")
_LABEL = re.compile(r"([\w$]+):")
_INLINE = re.compile(r"// begin inline asm.*?// end inline asm", re.S)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)


class PtxError(Exception):
    """Something that the interpreter does not know, or that a chip would not have done."""


class Register(NamedTuple):
    index: int
    width: int  # in bits; 0 for a predicate


class Immediate(NamedTuple):
    """An integer, or the bits of a float whose kind is "f32" or "f64"."""

    value: int
    kind: str = "int"


class Symbol(NamedTuple):
    """A special register, a parameter, a label, a name in shared memory, or `_`, which takes what nobody wants."""

    name: str


class Vector(NamedTuple):
    items: tuple


class Address(NamedTuple):
    base: Register | Immediate | Symbol
    offset: int


class Instruction(NamedTuple):
    """guard: the predicate in front, and whether `!` stands before it. source: line of the kernel's own source."""

    opcode: str
    operands: tuple
    guard: tuple[Register, bool] | None
    text: str
    line: int
    source: int | None

    def error(self, message: str) -> PtxError:
        source = f", source line {self.source}" if self.source else ""
        return PtxError(f"PTX line {self.line}{source}: {message}: {self.text}")


class Parameter(NamedTuple):
    name: str
    type: str


@dataclass
class Kernel:
    """registers: the width in bits of each. shared: the names of arrays in shared memory, with their offsets."""

    name: str
    parameters: list[Parameter]
    threads: int | None
    shared: dict[str, int]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: list[int] = field(default_factory=list)


def parse(text: str, name: str | None = None) -> Kernel:
    """The kernel of that name, or the one kernel of a PTX module.

    Raises: PtxError, at a directive that is not known, or if there is not exactly one such kernel.
    """
    # within inline assembly LLVM adds the number of the assembly's line to that of the source
    text = _INLINE.sub(lambda block: re.sub(r"\.loc[^\n]*", "", block[0]), text)
    text = _COMMENT.sub(lambda comment: "\n" * comment[0].count("\n"), text)
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{", text, re.S))
    header = text[: entries[0].start()] if entries else text
    _check_header(header)
    entries = [entry for entry in entries if name in (None, entry[1])]
    if len(entries) != 1:
        raise PtxError(f"a module must have exactly one kernel{f' {name}' if name else ''}, got {len(entries)}")
    name, parameters, limits = entries[0].groups()
    threads = re.fullmatch(r"\s*(?:\.(?:req|max)ntid\s+(\d+)(?:,\s*1,\s*1)?\s*)?(?:\.minnctapersm\s+\d+\s*)?", limits)
    if threads is None:
        raise PtxError(f"directive not known: {limits.strip()}")
    kernel = Kernel(name, _parameters(parameters), threads[1] and int(threads[1]), _shared(header))
    _Body(kernel, text, entries[0].end()).read()
    return kernel


def _check_header(text: str) -> None:
    for line, content in enumerate(text.splitlines(), 1):
        directive = re.match(r"\s*\.([a-z_]+)", content)
        if content.strip() and (directive is None or directive[1] not in _HEADER):
            raise PtxError(f"PTX line {line}: directive not known: {content.strip()}")


def _parameters(text: str) -> list[Parameter]:
    found = []
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        if match := re.fullmatch(r"\.param\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d+)\]", declaration):
            found.append(Parameter(match[1], f"b8[{match[2]}]"))  # a structure
            continue
        match = re.fullmatch(r"\.param\s+\.([busf]\d+)\s+(?:\.ptr\s+\.global\s+\.align\s+\d+\s+)?([\w$]+)", declaration)
        if match is None:
            raise PtxError(f"parameter not known: {declaration}")
        found.append(Parameter(match[2], match[1]))
    return found


def _shared(text: str) -> dict[str, int]:
    """The dynamic array starts where the launched shared memory does; sizes in the text would need a layout."""
    found = {}
    for name, size in re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d*)\]", text):
        if size or found:
            raise PtxError(f"only one array in shared memory, of a size given at launch, is known: {name}[{size}]")
        found[name] = 0
    return found


class _Body:
    """Reads the statements between a kernel's braces."""

    def __init__(self, kernel: Kernel, text: str, start: int) -> None:
        self.kernel, self.text, self.at = kernel, text, start
        self.line = text.count("\n", 0, start) + 1
        self.scopes: list[dict[str, Register]] = [{}]
        self.operands: dict[str, object] = {}  # in the current scope
        self.source: int | None = None

    def read(self) -> None:
        while self.scopes:
            self._move(re.compile(r"[\s;]*").match(self.text, self.at).end())
            if self.at == len(self.text):
                raise PtxError("the kernel's closing brace is missing")
            if self.text[self.at] in "{}":
                self._scope()
            elif label := _LABEL.match(self.text, self.at):
                self.kernel.labels[label[1]] = len(self.kernel.instructions)
                self._move(label.end())
            else:
                self._statement()

    def _move(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def _scope(self) -> None:
        if self.text[self.at] == "{":
            self.scopes.append({})
        else:
            self.scopes.pop()
        self.operands.clear()
        self.at += 1

    def _statement(self) -> None:
        if self.text.startswith(".loc", self.at):  # the one statement without a semicolon
            line_end = self.text.index("\n", self.at)
            self.source = int(self.text[self.at : line_end].split()[2]) or None
            self._move(line_end)
            return
        end = self.text.find(";", self.at)
        statement = " ".join(self.text[self.at : end].split())
        if statement.startswith(".reg "):
            self._declare(statement)
        elif not statement.startswith("."):
            self._instruction(statement)
        elif statement[1:].split()[0] not in _IGNORED:
            raise PtxError(f"PTX line {self.line}: directive not known: {statement}")
        self._move(end + 1)

    def _declare(self, statement: str) -> None:
        match = re.fullmatch(r"\.reg \.([busf]\d+|pred) (.+)", statement)
        untyped = match and (match[1] if match[1] == "pred" else _UNTYPED[match[1][0]] + match[1][1:])
        if untyped not in WIDTHS:
            raise PtxError(f"PTX line {self.line}: registers not known: {statement}")
        for name in match[2].split(","):
            many = re.fullmatch(r"\s*(%?[\w$]+?)(?:<(\d+)>)?\s*", name)
            for full in [f"{many[1]}{i}" for i in range(int(many[2]))] if many[2] else [many[1]]:
                self.scopes[-1][full] = Register(len(self.kernel.registers), WIDTHS[untyped])
                self.kernel.registers.append(WIDTHS[untyped])
        self.operands.clear()

    def _instruction(self, statement: str) -> None:
        guard, rest = None, statement
        if match := _GUARD.match(statement):
            guard, rest = (self._operand(match[2]), bool(match[1])), statement[match.end() :]
        opcode, _, operands = rest.partition(" ")
        operands = tuple(self._cached(operand) for operand in _split(operands))
        self.kernel.instructions.append(Instruction(opcode, operands, guard, statement, self.line, self.source))

    def _cached(self, text: str):
        if text not in self.operands:
            self.operands[text] = self._operand(text)
        return self.operands[text]

    def _operand(self, text: str):
        if text.startswith("{") and text.endswith("}"):
            return Vector(tuple(self._cached(item) for item in _split(text[1:-1])))
        if match := _ADDRESS.match(text):
            return Address(self._operand(match[1]), _number(match[2]).value if match[2] else 0)
        if "|" in text:
            return Vector(tuple(self._operand(item.strip()) for item in text.split("|")))
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if number := _number(text):
            return number
        if _SPECIAL.match(text) or re.fullmatch(r"[A-Za-z_$][\w$]*", text):
            return Symbol(text)
        raise PtxError(f"PTX line {self.line}: operand not known: {text}")


def _split(operands: str) -> list[str]:
    """At commas outside of braces and brackets."""
    return [part.strip() for part in re.findall(r"\s*((?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+)", operands)]


def _number(text: str) -> Immediate | None:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Immediate(int(text[2:], 16), "f32")
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Immediate(int(text[2:], 16), "f64")
    return Immediate(int(text.rstrip("U"), 0)) if _NUMBER.match(text) else None
