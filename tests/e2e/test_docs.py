"""Every command of the documentation runs as it is printed, from a folder that holds example_configs/.

Most are forked from a process that has done the imports. In the shell: the README's first, and what needs one.
"""

import json
import re
import shlex
import sys

import pytest

from .commands import REPOSITORY, run
from .ranks import environment

pytestmark = pytest.mark.e2e

README = (REPOSITORY / "README.md").read_text()
PAGES = [README, *(path.read_text() for path in sorted((REPOSITORY / "docs").glob("*.md")))]
SETUP = re.findall(r"^pip install .*? && (axolotl .*)$", README, flags=re.MULTILINE)
COMMANDS = [
    line
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    for line in block.splitlines()
    if line
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    (folder / "example_configs").symlink_to(REPOSITORY / "example_configs")
    return folder


def test_the_readme_has_its_two_setup_lines():
    assert SETUP == ["axolotl train example_configs/quickstart/qtha.yml"]
    assert any(line.startswith('pip install -e ".[test]" && pytest') for line in README.splitlines())
    assert SETUP[0] in COMMANDS
    assert len(COMMANDS) == len(set(COMMANDS)) >= 26


# In the order of the README, then of the pages by name: later commands use what earlier ones wrote.
@pytest.mark.parametrize("command", COMMANDS)
def test_command(clone, forked, command):
    if command in SETUP or not re.fullmatch(r"(axolotl|python -m) [\w./, -]+", command) or "--launcher" in command:
        env = environment("deepspeed") if "--nproc_per_node" in command else {}  # ranks on this CPU, for want of GPUs
        done = run(["bash", "-c", command], clone, **env)
    else:
        done = forked(shlex.split(command), clone)
    assert done.returncode == 0, done.stdout[-4000:]
    if "inference" in command:
        answer = done.stdout.split("### Response:")[-1]
        assert len(answer.strip()) > 20, done.stdout[-2000:]
    if command.startswith("axolotl train") and "qtha" in command:
        assert done.stdout.count("expected memory of one process") == 1
        assert (
            len(re.findall(r"What next:\n.*  axolotl (evaluate|inference) example_configs/\S+ --lora-model-dir", done.stdout))
            == 1
        )
    if "evaluate" in command:
        value = float(re.findall(r"'?eval_loss'?: '?([\d.]+)", done.stdout)[-1])
        assert value < 3.8  # the base alone has 4.35


def test_python_of_the_pages(clone):
    """The blocks of Python on the pages of docs/ run beside what their commands wrote, each with names of its own."""
    blocks = [block for page in PAGES[1:] for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)]
    assert len(blocks) >= 2
    done = run([sys.executable, "-c", f"for block in {blocks!r}:\n    exec(block, {{}})"], clone)
    assert done.returncode == 0, done.stdout[-4000:]


def test_quickstart_loss_falls(clone):
    state = json.loads((clone / "outputs/quickstart-qtha/checkpoint-60/trainer_state.json").read_text())
    train = [row["loss"] for row in state["log_history"] if "loss" in row]
    held_out = [row["eval_loss"] for row in state["log_history"] if "eval_loss" in row]
    assert len(train) == 60
    assert sum(train[-10:]) / 10 < sum(train[:3]) / 3 - 0.5
    assert held_out[-1] < held_out[0] - 0.5


def test_resumed_quickstart_ends_as_the_uninterrupted_one(clone):
    def log(folder):
        state = json.loads((clone / f"outputs/{folder}/checkpoint-60/trainer_state.json").read_text())
        return {row["step"]: row["loss"] for row in state["log_history"] if "loss" in row}

    first, resumed = log("quickstart-qtha"), log("quickstart-resumed")
    assert max(abs(first[step] - resumed[step]) for step in range(31, 61)) < 1e-3
