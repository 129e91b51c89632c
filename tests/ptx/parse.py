"""PTX text -> kernels: lists of instructions with parsed operands. Knows the grammar, not what instructions mean.

Inline assembly may open scopes of its own ({ .reg .b16 low; ... }): their registers and labels are renamed with the
number of the scope, so that a kernel has one flat list of each.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field

# Bytes of a value of each type.
SIZES = {"pred": 1, "b128": 16, "f16x2": 4, "bf16x2": 4, "f16": 2, "bf16": 2, "f32": 4, "f64": 8}
SIZES |= {f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)}


class PtxError(Exception):
    """What the interpreter cannot read, or what the kernel does wrong."""


@dataclass(frozen=True)
class Register:
    name: str
    kind: str  # pred, b16, b32, b64
    row: int  # among the registers of its kind


@dataclass(frozen=True)
class Special:
    name: str  # "%tid.x"


@dataclass(frozen=True)
class Immediate:
    bits: int  # of an integer (maybe negative) or of a float


@dataclass(frozen=True)
class Symbol:
    name: str  # a variable, a parameter or a label


@dataclass(frozen=True)
class Sink:
    """`_`: a result that nobody wants."""


@dataclass(frozen=True)
class Not:
    operand: Register


@dataclass(frozen=True)
class Vector:
    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Pair:
    """`%p|%q`: two results."""

    first: Operand
    second: Operand


Operand = Register | Special | Immediate | Symbol | Sink | Not | Vector | Address | Pair


@dataclass(frozen=True)
class Instruction:
    opcode: str  # "ld" of ld.global.nc.v4.b32
    modifiers: tuple[str, ...]  # ("global", "nc", "v4", "b32")
    operands: tuple[Operand, ...]
    guard: Register | None  # @%p1: only lanes where it holds ...
    negated: bool  # ... or does not
    text: str
    line: int  # in the PTX text
    source: str  # "file:line" in the source the PTX was made of, where it says so

    @property
    def type(self) -> str:
        """The last modifier that names a type."""
        return next(m for m in reversed(self.modifiers) if m in SIZES)

    @property
    def types(self) -> list[str]:
        return [m for m in self.modifiers if m in SIZES]

    @property
    def space(self) -> str | None:
        """State space of a memory access, None for the generic one."""
        spaces = (m.partition("::")[0] for m in self.modifiers)
        return next((s for s in spaces if s in ("global", "shared", "local", "param", "const")), None)

    @property
    def vector(self) -> int:
        return next((int(m[1:]) for m in self.modifiers if m in ("v2", "v4", "v8")), 1)

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers


@dataclass
class Variable:
    space: str  # global, const, shared, local
    align: int
    size: int
    data: bytes | None = None
    extern: bool = False  # dynamic shared memory


@dataclass
class Kernel:
    name: str
    params: dict[str, tuple[int, int]]  # name -> (offset, size) in the block of parameters
    param_bytes: int
    threads: int | None  # .maxntid or .reqntid: the most a block may have
    code: list[Instruction] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)  # how many of each kind
    labels: dict[str, int] = field(default_factory=dict)  # name -> index into code
    variables: dict[str, Variable] = field(default_factory=dict)


class Module:
    """The kernels of a PTX text, each read when it is first asked for."""

    def __init__(self, text: str):
        text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)
        self.text = re.sub(r"//[^\n]*", "", text)
        self.line_ends = [m.start() for m in re.finditer("\n", self.text)]
        self.files = {number: path.rsplit("/", 1)[-1] for number, path in FILE.findall(self.text)}
        self.entries = {match[1]: match for match in ENTRY.finditer(self.text)}
        first = min((match.start() for match in self.entries.values()), default=None)
        self.variables = dict(_variable(match) for match in VARIABLE.finditer(self.text[:first]))
        self.read: dict[str, Kernel] = {}

    def kernel(self, part: str = "") -> Kernel:
        """The kernel of this name, or the only one whose name contains it. Raises PtxError with the line it cannot read."""
        found = [part] if part in self.entries else [name for name in self.entries if part in name]
        if len(found) != 1:
            raise PtxError(f"{len(found)} kernels match {part!r} among {', '.join(self.entries)}")
        name = found[0]
        if name not in self.read:
            self.read[name] = _Body(self, self.entries[name]).kernel
        return self.read[name]


ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{;]*)\{")
VARIABLE = re.compile(
    r"((?:\.(?:visible|extern|weak|common)\s+)*)\.(global|const|shared|local)\s+(?:\.align\s+(\d+)\s+)?"
    r"\.(\w+)\s+([\w$%]+)((?:\[\d*\])*)\s*(?:=\s*(\{[^}]*\}|[^;]+))?;"
)
SPACE = re.compile(r"\s*")
LABEL = re.compile(r"([\w$%]+)\s*:(?!:)")
FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.M)
INTEGER = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|\d+)U?$")
SPECIAL = re.compile(
    r"%(?:(?:tid|ntid|ctaid|nctaid)\.[xyz]|laneid|warpid|nwarpid|smid|dynamic_smem_size|lanemask_(?:eq|lt|le|gt|ge))$"
)


def _variable(match: re.Match) -> tuple[str, Variable]:
    linkage, space, align, kind, name, dims, data = match.groups()
    each = SIZES[kind]
    count = 1
    for n in re.findall(r"\[(\d*)\]", dims):
        count *= int(n or 0)
    raw = None
    if data:
        numbers = [_number(x.strip()) for x in data.strip("{} \n\t").split(",")]
        raw = b"".join((n % (1 << 8 * each)).to_bytes(each, "little") for n in numbers)
    return name, Variable(space, int(align or each), count * each, raw, "extern" in linkage)


def _number(text: str) -> int:
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return int(text[2:], 16)
    if not INTEGER.match(text):
        raise PtxError(f"cannot read the number {text!r}")
    return int(text.rstrip("U"), 0)


class _Body:
    """Reads one kernel: the statements between its braces."""

    def __init__(self, module: Module, entry: re.Match):
        self.text, self.files, self.line_ends = module.text, module.files, module.line_ends
        self.names: list[dict[str, Register]] = [{}]  # registers, innermost scope last
        self.scope_path = [0]
        self.scopes = 0
        self.labels: dict[tuple[int, str], int] = {}
        self.source = ""
        params, size = {}, 0
        for declaration in filter(None, (p.strip() for p in entry[2].split(","))):
            kind = next(k for k in re.findall(r"\.(\w+)", declaration) if k in SIZES)
            name, dims = re.search(r"([\w$%]+)((?:\[\d+\])?)$", declaration).groups()
            align = re.search(r"(?<!\.ptr )\.align\s+(\d+)", declaration)
            each = SIZES[kind] * (int(dims[1:-1]) if dims else 1)
            step = int(align[1]) if align and ".ptr" not in declaration else SIZES[kind]
            size = -(-size // step) * step
            params[name] = (size, each)
            size += each
        threads = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", entry[3])
        most = None
        if threads:
            most = 1
            for n in threads.groups():
                most *= int(n or 1)
        self.kernel = Kernel(entry[1], params, size, most, variables=dict(module.variables))
        self.statements: list[tuple[str, int, str, tuple[int, ...], tuple]] = []
        self.scan(entry.end())
        code = self.kernel.code
        for statement in self.statements:
            code.append(self.instruction(*statement))
        self.kernel.labels = {f"{name}@{scope}": at for (scope, name), at in self.labels.items()}

    def fail(self, line: int, statement: str, reason: object) -> PtxError:
        return PtxError(f"{self.kernel.name}, PTX line {line}: cannot read {statement!r}: {reason}")

    def scan(self, at: int) -> None:
        """Walk the statements from the opening brace to the closing one."""
        text, depth = self.text, 1
        while depth:
            at = SPACE.match(text, at).end()
            line = bisect_right(self.line_ends, at - 1) + 1
            if text[at] == "{":
                depth += 1
                self.scopes += 1
                self.names.append({})
                self.scope_path.append(self.scopes)
                at += 1
            elif text[at] == "}":
                depth -= 1
                self.names.pop()
                self.scope_path.pop()
                at += 1
            elif text.startswith((".loc\t", ".loc ", ".file"), at):
                end = text.index("\n", at)
                words = text[at:end].split()
                if words[0] == ".loc":
                    self.source = f"{self.files.get(words[1], words[1])}:{words[2]}"
                at = end
            elif match := LABEL.match(text, at):
                self.labels[self.scope_path[-1], match[1]] = len(self.statements)
                at = match.end()
            else:
                end = text.index(";", at)
                statement = " ".join(text[at:end].split())
                at = end + 1
                if statement.startswith(".reg"):
                    self.declare(statement, line)
                elif match := VARIABLE.match(statement + ";"):
                    self.kernel.variables.update([_variable(match)])
                elif statement and not statement.startswith(".pragma"):
                    if statement[0] == ".":
                        raise self.fail(line, statement, "unknown directive")
                    names = tuple(self.names)
                    self.statements.append((statement, line, self.source, tuple(self.scope_path), names))

    def declare(self, statement: str, line: int) -> None:
        _, kind, names = statement.split(None, 2)
        size = SIZES.get(kind[1:])
        if size is None or size > 8:
            raise self.fail(line, statement, "unknown kind of register")
        kind = "pred" if kind == ".pred" else f"b{max(16, 8 * size)}"
        for name in (n.strip() for n in names.split(",")):
            several = re.match(r"(.+)<(\d+)>$", name)
            all_names = [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [name]
            for each in all_names:
                row = self.kernel.registers.get(kind, 0)
                self.kernel.registers[kind] = row + 1
                self.names[-1][each] = Register(each, kind, row)

    def instruction(self, statement: str, line: int, source: str, scopes: tuple, names: tuple) -> Instruction:
        self.current = scopes, names
        guard, negated, rest = None, False, statement
        if match := re.match(r"@(!?)\s*(%?[\w$]+)\s+", statement):
            negated, rest = bool(match[1]), statement[match.end() :]
            guard = self.operand(match[2])
        word, _, arguments = rest.partition(" ")
        opcode, *modifiers = word.split(".")
        try:
            operands = tuple(self.operand(part) for part in _split(arguments))
        except (ValueError, KeyError) as error:
            raise self.fail(line, statement, error) from error
        return Instruction(opcode, tuple(modifiers), operands, guard, negated, statement, line, source)

    def operand(self, text: str) -> Operand:
        text = text.strip()
        if text == "_":
            return Sink()
        if text[0] == "{":
            return Vector(tuple(self.operand(part) for part in _split(text[1:-1])))
        if text[0] == "[":
            base, sign, offset = re.fullmatch(r"\[\s*([\w$%]+)\s*(?:([+-])\s*(-?\w+)\s*)?\]", text).groups()
            number = int((offset or "0").rstrip("U"), 0)
            return Address(self.operand(base), -number if sign == "-" else number)
        if text[0] == "(":
            raise ValueError("function calls are not supported")
        if text[0] == "!":
            return Not(self.operand(text[1:]))
        if "|" in text:
            return Pair(*(self.operand(part) for part in text.split("|")))
        if text[:2] in ("0f", "0F", "0d", "0D") or INTEGER.match(text):
            return Immediate(_number(text))
        if SPECIAL.match(text):
            return Special(text)
        scopes, names = self.current
        for scope in reversed(names):
            if text in scope:
                return scope[text]
        for scope in reversed(scopes):
            if (scope, text) in self.labels:
                return Symbol(f"{text}@{scope}")
        if text in self.kernel.variables or text in self.kernel.params:
            return Symbol(text)
        raise ValueError(f"unknown name {text!r}")


def _split(text: str) -> list[str]:
    """Comma-separated operands; commas in brackets do not count."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "{[(") - (character in ")]}")
        if character == "," and not depth:
            parts.append(text[start:at])
            start = at + 1
    last = text[start:]
    return [*parts, last] if last.strip() else parts
