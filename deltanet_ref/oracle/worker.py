"""The child process of runners.Worker: pickled questions on stdin, pickled replies on the original stdout."""

import os
import pickle
import sys


def main():
    """Answer questions until stdin ends."""
    questions, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # callables print to stderr

    def reply(value):
        pickle.dump(value, replies)
        replies.flush()

    setup = pickle.load(questions)
    from deltanet_ref.errors import InputError, InternalError
    from deltanet_ref.oracle.runners import Callables, load_callable

    try:
        forward = load_callable(setup["forward"])
        backward = setup["backward"]
        if backward not in (None, "autograd"):
            backward = load_callable(backward)
        array = setup["array"] or ("torch" if uses_torch(forward) else "numpy")
        runner = Callables(forward, backward, array=array, device=setup["device"], dtype=setup["dtype"])
    except InputError as error:
        return reply(error)
    except ImportError as error:
        return reply(InputError(f"--array {setup['array']} cannot be used here: {error}"))
    reply({"provenance": runner.provenance, "array": array})
    while True:
        try:
            case, inputs, layout = pickle.load(questions)
        except EOFError:
            return
        try:
            reply(runner.run(case, inputs, layout))
        except InputError as error:
            reply(error)
        except Exception as error:  # run answers for what the callable raises
            reply(InternalError.of(error, f"calling the implementation on {case.id}"))


def uses_torch(function):
    """Whether the function's module has imported torch, under whatever name."""
    module = sys.modules.get(getattr(function, "__module__", None))
    return (
        any(
            getattr(value, "__name__", "").split(".")[0] == "torch"
            for value in vars(module).values()
            if type(value).__name__ == "module"
        )
        if module
        else False
    )


if __name__ == "__main__":
    main()
