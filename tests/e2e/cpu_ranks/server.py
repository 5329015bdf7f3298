"""Trains on several ranks, again and again: every rank is forked from a process that has done the imports, half of a run's time.

Reads one job a line, {"config": path, "ranks": number, "log": path, "killed": value of QTHA_KILL or ""}, and writes the ranks'
exit codes to the file descriptor that its argument names. A rank that stands still ends after STILL seconds, with the stacks
of its threads in the log.
"""

import faulthandler
import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback

WANTED = ("accelerate.accelerator", "axolotl.core.builders", "axolotl.loaders", "axolotl.train", "axolotl.utils.data")
WANTED += ("axolotl_qtha.plugin", "bitsandbytes", "deepspeed", "peft", "transformers.trainer", "trl")
STILL = 400


def serve(answers):
    for name in WANTED:
        importlib.import_module(name)
    gc.freeze()  # for the ranks' collections of garbage, which would read, and so copy, all of it
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        children = [fork(job, rank, port) for rank in range(job["ranks"])]
        codes = wait(children, job["killed"])
        print(json.dumps(codes), file=answers, flush=True)


def wait(children, killed):
    """Return the exit codes; where one rank is to be killed, the others are ended with it, as torchrun does."""
    codes = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if killed and codes[child]:
            for other in set(children) - codes.keys():
                os.kill(other, signal.SIGKILL)
    return [codes[child] for child in children]


def fork(job, rank, port):
    if child := os.fork():
        return child
    code = 1
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.dump_traceback_later(STILL, exit=True)
        world = str(job["ranks"])
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "QTHA_KILL": job["killed"] or "-1:0:"}
        sys.argv = ["axolotl", "train"]
        from axolotl.cli.train import do_cli

        do_cli(job["config"])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":  # not where a rank starts a process of its own
    with os.fdopen(int(sys.argv[1]), "w") as pipe:
        serve(pipe)
