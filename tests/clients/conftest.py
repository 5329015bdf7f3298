"""What the clients' tests share in a session: the trained adapters, and the table of what was found."""

import os
from pathlib import Path

import pytest

from .clients import TOLERANCE
from .models import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("clients"))


TITLES = {"peft": "PEFT", "vllm": "vLLM", "llamacpp": "llama.cpp"}


class Table:
    """What was found, by export and client; printed at the end, and written where CLIENTS_TABLE says."""

    def __init__(self):
        self.differences = {}  # nats, or words
        self.refusals = {}  # the same; the client may have options, after a comma

    def text(self):
        lines = [f"| Export | {' | '.join(TITLES.values())} |", "| --- |" + " ---: |" * len(TITLES)]
        for export, found in self.differences.items():
            cells = (found.get(client, "not run") for client in TITLES)
            lines.append(f"| {export} | {' | '.join(cell if isinstance(cell, str) else f'{cell:.0e}' for cell in cells)} |")
        lines += ["", "| Export | Client | What it does |", "| --- | --- | --- |"]
        for export, found in self.refusals.items():
            for client, said in found.items():
                program, *options = client.partition(",")
                does = f"refuses: {said}" if isinstance(said, str) else "reads it"
                if not isinstance(said, str) and said >= TOLERANCE:
                    does = f"reads it as another model: {said:.1g} apart"
                lines.append(f"| {export} | {TITLES[program]}{''.join(options)} | {does} |")
        return "\n".join(lines)


@pytest.fixture(scope="session")
def table():
    found = Table()
    yield found
    print("\n" + found.text())
    if where := os.environ.get("CLIENTS_TABLE"):
        Path(where).write_text(found.text() + "\n")
