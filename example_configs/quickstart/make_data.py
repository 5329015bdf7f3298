"""Build the quickstart's text from packages that are installed with this project.

Docstrings and long comments of Python's standard library, NumPy and PyTorch are what ``make_base``
pre-trains on; it asks for them in memory and they are not kept.  The fine-tuning data, questions
about Qiskit's public API answered with its docstrings, are written to ``data/*.jsonl``.
"""

import argparse
import ast
import importlib
import inspect
import io
import json
import pkgutil
import random
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "_vendor"}
SKIPPED_FOLDERS |= {"encodings", "__pycache__", "_inductor", "_dynamo", "distributed", "onnx"}
# Licence notices are boilerplate that a small model would learn by heart before anything else.
NOTICE = re.compile(r"copyright|licen[cs]e|all rights reserved|warrant", re.IGNORECASE)
# What ends the descriptive head of a Google-style docstring.
SECTION = re.compile(r"^(\.\. |>>>|\|+ |\* |- |[=\-~^]{4,}|[A-Z][\w ]{2,30}:$)", re.MULTILINE)
# What shows that a description is unfit: markup left over, citations, or nothing of its own.
UNFIT = re.compile(r"\bdeprecated\b|\\|[{}<>|]|:\w+:|\[\d|Alias for|^Run the .* pass on|= .*= ")


def is_prose(text: str, shortest: int) -> bool:
    """Tell whether ``text`` reads as English: long enough, ASCII, mostly letters and blanks."""
    if len(text) < shortest or not text.isascii() or NOTICE.search(text):
        return False
    wordlike = sum(char.isalpha() or char == " " for char in text)
    return wordlike / len(text) > 0.75 and len(text.split()) >= 6


def comment_blocks(source: str) -> Iterator[str]:
    """Yield runs of whole-line comments, joined and without their ``#`` signs."""
    block: list[str] = []
    last_line = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            if token.start[0] != last_line + 1:
                yield "\n".join(block)
                block = []
            block.append(re.sub(r"^#+:? ?", "", token.string).rstrip())
            last_line = token.start[0]
    yield "\n".join(block)


def source_texts(source: str) -> Iterator[str]:
    """Yield docstrings, long string constants (such as pydoc's topics) and long comments."""
    for node in ast.walk(ast.parse(source)):
        text, shortest = "", 60
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text, shortest = inspect.cleandoc(node.value), 400
        if is_prose(text, shortest):
            yield text
    yield from (text for text in comment_blocks(source) if is_prose(text, 160))


def pretraining_documents() -> list[str]:
    """Return the de-duplicated pre-training texts, in a fixed order (sorted by path)."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    roots += [Path(importlib.import_module(name).__path__[0]) for name in ("numpy", "torch")]
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # old escapes such as "\d"
    seen: dict[str, None] = {}
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if SKIPPED_FOLDERS & set(path.relative_to(root).parts):
                continue
            try:
                texts = list(source_texts(path.read_text(encoding="utf-8")))
            except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
                continue  # templates and deliberately broken samples are not worth a special case
            for text in texts:
                seen.setdefault(re.sub(r"[ \t]+\n", "\n", text).strip())
    return list(seen)


def plain(text: str) -> str:
    """Reduce reST markup to plain text: roles, links and literals become what they name."""
    text = re.sub(r":math:`([^`]*)`", r"\1", text)
    text = re.sub(r"(:[\w:]+:)?`([^`<]+?)\s*<[^`>]*>`_{0,2}", r"\2", text)
    text = re.sub(r":[\w:]+:`(?:~[^`]*?(?=[^.`]+`)|\.)?([^`]+)`", r"`\1`", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"\1", text).replace("``", "`")
    return re.sub(r"\s+", " ", text).strip()


def description(doc: str, longest: int) -> str:
    """Return the paragraphs of ``doc`` before its first section, as many as fit ``longest``."""
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        head = SECTION.split(paragraph, maxsplit=1)[0]
        text = "" if head.startswith(" ") else plain(head)
        if not text or text.endswith(":") or len(" ".join([*kept, text])) > longest:
            break
        kept.append(text)
        if head != paragraph:
            break
    return " ".join(kept)


def qiskit_members() -> Iterator[tuple[str, str, object]]:
    """Yield (kind, public dotted name, object) for Qiskit's classes, functions and methods."""
    import qiskit

    warnings.filterwarnings("ignore", category=DeprecationWarning)  # packages about to be removed
    packages = ["qiskit"]
    for info in pkgutil.walk_packages(qiskit.__path__, "qiskit.", onerror=lambda name: None):
        if info.ispkg and "._" not in info.name:
            packages.append(info.name)
    # Shortest path first, so that each object is named as users import it.
    for package in sorted(packages, key=lambda name: (name.count("."), name)):
        try:
            module = importlib.import_module(package)
        except ImportError:
            continue  # drawing code that wants optional packages
        for name, member in sorted(vars(module).items()):
            home = str(getattr(member, "__module__", ""))
            if name.startswith("_") or not home.startswith("qiskit"):
                continue
            if inspect.isclass(member):
                yield "class", f"{package}.{name}", member
                for attribute, value in sorted(vars(member).items()):
                    if not attribute.startswith("_"):
                        kind = "property" if isinstance(value, property) else "method"
                        yield kind, f"{package}.{name}.{attribute}", value
            elif inspect.isroutine(member):
                yield "function", f"{package}.{name}", member


def qiskit_pairs(shortest: int, longest: int) -> list[dict[str, str]]:
    """Return alpaca rows, one per distinct description, in a fixed order."""
    questions = {"class": "What is `{}`?", "property": "What does the property `{}` hold?"}
    rows: dict[str, dict[str, str]] = {}
    for kind, name, member in qiskit_members():
        doc = getattr(member, "__doc__", None)
        if not isinstance(doc, str):
            continue
        output = description(inspect.getdoc(member) or doc, longest)
        sentence = len(output) >= shortest and output[-1] in ".!" and output.isascii()
        if not sentence or UNFIT.search(output):
            continue
        instruction = questions.get(kind, "What does `{}` do?").format(name)
        # The same opening means the same answer, reworded: one row of these is enough, and it
        # keeps near-copies of a training answer out of the validation file.
        key = re.sub(r"\W+", " ", output.lower())[:32]
        rows.setdefault(key, {"instruction": instruction, "input": "", "output": output})
    return list(rows.values())


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    """Write the fine-tuning files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here / "data", help="folder to write to")
    parser.add_argument("--seed", type=int, default=42, help="seed of the split (default 42)")
    parser.add_argument("--pairs", type=int, default=900, help="most pairs to keep (default 900)")
    parser.add_argument("--held-out", type=int, default=72, help="validation rows (default 72)")
    parser.add_argument("--preferences", type=int, default=64, help="preference rows (default 64)")
    args = parser.parse_args()

    # The longest answer still fits 256 tokens of ``base``'s tokenizer together with its prompt.
    rows = qiskit_pairs(shortest=40, longest=420)
    print(f"{len(rows)} distinct pairs found")
    random.Random(args.seed).shuffle(rows)
    validation, train = rows[: args.held_out], rows[args.held_out : args.pairs]
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(args.out / "train.jsonl", train)
    write_jsonl(args.out / "validation.jsonl", validation)
    # A rejected answer is a real answer to another question: fluent, yet wrong.
    chosen = train[: args.preferences]
    rejected = chosen[1:] + chosen[:1]
    pairs = [
        {"prompt": good["instruction"], "chosen": good["output"], "rejected": bad["output"]}
        for good, bad in zip(chosen, rejected, strict=True)
    ]
    write_jsonl(args.out / "preference.jsonl", pairs)


if __name__ == "__main__":
    main()
