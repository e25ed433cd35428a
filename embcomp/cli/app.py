"""The Typer application: registers the verbs and turns known errors into one message each."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from embcomp.cli import (
    bench,
    benchmark,
    catalog,
    compare,
    compress,
    consoles as console,
    demo,
    diff,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    patch,
    plan,
    prepare,
    score,
    search,
    stopping,
    train,
    validate,
)
from embcomp.errors import EmbcompError

# Wrong usage and wanted exits; newer versions of typer hold a click of their own.
_TYPERS_OWN: tuple[type[Exception], ...] = (
    typer.Exit,
    typer.Abort,
    *(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException"),
)


class _Verbs(TyperGroup):
    """Prints an error as one red line with exit code 1 instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with stopping.raising_sigterm():
                result = super().invoke(ctx)
                if sys.stdout is not None:
                    sys.stdout.flush()  # here, where a failure can still be told
                return result
        except (KeyboardInterrupt, stopping.Terminated) as stop:
            stopping.say_stopped(stop, "run it again to have its answer")
            raise typer.Exit(stopping.exit_code(stop)) from None
        except BrokenPipeError:
            stopping.leave_stdout()
            raise typer.Exit(stopping.PIPE_CLOSED) from None
        except EmbcompError as error:
            console.fail(str(error))
        except ImportError as error:
            console.fail(
                f"{error}; run `embcomp doctor` to see what is wrong with the installation"
            )
        except _TYPERS_OWN:
            raise
        except OSError as error:
            if _wants_traceback(ctx):
                raise
            # A full disk, a missing file or a file where a folder should be is the machine's state,
            # not our defect. Libraries that cannot be loaded raise without a number.
            if error.errno is None:
                console.fail(f"{error}; if a library is at fault, `embcomp doctor` knows more")
            else:
                names = [str(name) for name in (error.filename, error.filename2) if name]
                console.fail(": ".join([*names, error.strerror or str(error)]))
            stopping.leave_stdout()
        except Exception as error:
            if _wants_traceback(ctx):
                raise
            console.fail(stopping.describe_defect(error))
        raise typer.Exit(1)


def _wants_traceback(ctx: Any) -> bool:
    return bool(ctx.params.get("traceback")) or os.environ.get(stopping.DEBUG, "") not in ("", "0")


app = typer.Typer(
    name="embcomp",
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compressed embedding tables for TorchRec: prepare data, plan bytes, train, compare.",
)


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        console.stdout().print(f"embcomp {version('embcomp')}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the traceback of an unexpected error.")
    ] = False,
) -> None:
    """Options that stand before the verb."""


app.command("doctor")(doctor.doctor)
app.command("generate")(generate.generate)
app.command("prepare")(prepare.prepare)
app.command("validate")(validate.validate)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("search")(search.search)
app.command("benchmark")(benchmark.benchmark)
app.command("evaluate")(evaluate.evaluate)
app.command("compress")(compress.compress)
app.command("export")(export.export)
app.command("score")(score.score)
app.command("inspect")(inspect.inspect)
app.command("bench")(bench.bench)
app.command("diff")(diff.diff)
app.command("patch")(patch.patch)
app.command("compare")(compare.compare)
app.command("demo")(demo.demo)
app.command("ls")(catalog.ls)
app.command("cat")(catalog.cat)
app.command("cp")(catalog.cp)
