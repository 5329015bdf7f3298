"""Runs commands, again and again: each process is forked from this one, which has done the imports, half of a short run's time.

Reads one job a line and writes the exit codes of its processes to the file descriptor that its argument names. A job:

    {"command": ["axolotl", ...] or ["python", "-m", ...], "cwd": folder, "log": path,
     "processes": [environment variables of each], "killed": whether one of them is to be killed, and the others with it}

A process that stands still ends after STILL seconds, with the stacks of its threads in the log.
"""

import faulthandler
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import traceback

from axolotl_qtha.bench.suite.worker import IMPORTS

WANTED = [*IMPORTS, "accelerate.accelerator", "axolotl.cli.config", "axolotl.cli.main"]
STILL = 400


def serve(answers):
    for name in [*WANTED, *(["deepspeed"] if "QTHA_CPU_RANKS" in os.environ else [])]:
        importlib.import_module(name)
    gc.freeze()  # for the processes' collections of garbage, which would read, and so copy, all of it
    for line in sys.stdin:
        job = json.loads(line)
        codes = wait([fork(job, env) for env in job["processes"]], job["killed"])
        print(json.dumps(codes), file=answers, flush=True)


def wait(children, killed):
    """Return the exit codes; where one process is to be killed, the others are ended with it, as torchrun does."""
    codes = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if killed and codes[child]:
            for other in set(children) - codes.keys():
                os.kill(other, signal.SIGKILL)
    return [codes[child] for child in children]


def fork(job, env):
    if child := os.fork():
        return child
    code = 1
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream, file in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
            os.dup2(file, stream)
        faulthandler.dump_traceback_later(STILL, exit=True)
        os.chdir(job["cwd"])
        os.environ |= env
        run(job["command"])
        code = 0
    except SystemExit as leaving:  # as an interpreter ends
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if code and not isinstance(leaving.code, int):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(command):
    if command[0] == "axolotl":
        from axolotl.cli.main import main

        sys.argv = command
        main()
    else:
        sys.path.insert(0, os.getcwd())
        sys.argv = command[2:]
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)


if __name__ == "__main__":  # not where a process starts one of its own
    with os.fdopen(int(sys.argv[1]), "w") as pipe:
        serve(pipe)
