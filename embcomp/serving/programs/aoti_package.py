"""`package.pt2`: a serving module compiled ahead of time by AOTInductor, for Python and for C++ without it.

Rows, and whatever else lies in the artefact's files as it is, are no part of the package: the code takes them as
further inputs, which are mapped from there when a package is loaded. Only constants of the methods, and what they
learnt in several pieces, are compiled in. What a caller needs to know stands in the package's own metadata, in
plain words, so that a C++ program needs no parser:

    inputs, outputs   names in the order in which the code takes and gives them; outputs with tabs between
    tables            how many tensors the code takes behind its inputs
    table.<n>         <file> <first byte> <type> <size> <size> ...
    features, dense   how many there are
    feature_names     in their order, with tabs between
    limits            for each feature, the first id that it refuses; -1 where it takes any
    torch, processor  what it was compiled with, and for

Compiled code is for one version of torch and one kind of processor, which loading checks.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embcomp.errors import ArtefactError, one_line
from embcomp.io.tensor_files import StoredTensor
from embcomp.layers.named_parts import persistent_tensors
from embcomp.serving.exported_program import Program, export_module, open_sizes
from embcomp.serving.programs.processor import instruction_sets
from embcomp.serving.programs.program_inputs import refused_ids

PACKAGE_FILE = "package.pt2"
_NAMED = 10
_TYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32)
}


class _TablesAsInputs(nn.Module):
    """A program that takes some of its tensors as inputs, and answers refused ids with NaN.

    What the program would raise for them ends the process where it is compiled.

    Args:
        program: the program.
        names: of those tensors, in order.
        limits: for each feature, the first id that it refuses; -1 where it takes any.
    """

    def __init__(self, program: Program, names: Sequence[str], limits: Sequence[int]) -> None:
        super().__init__()
        # Unregistered, so that what is given is no state of the program as well.
        self._program, self._names = [program], list(names)
        self._limits = list(limits)

    def forward(self, inputs: Mapping[str, Tensor], tables: Sequence[Tensor]) -> dict[str, Tensor]:
        """What the program answers from those tensors."""
        refused = refused_ids(torch.tensor(self._limits), inputs)
        given = {**inputs, "ids": torch.where(refused, 0, inputs["ids"])}
        held = dict(zip(self._names, tables))
        found = torch.func.functional_call(self._program[0], held, (given,))
        wrong = refused.flatten(1).any(dim=1)
        return {
            name: torch.where(wrong.unsqueeze(1) if own.dim() == 2 else wrong, torch.nan, own)
            for name, own in found.items()
        }


def write_package(
    program: Program, folder: Path, shared: Mapping[str, StoredTensor], words: Mapping[str, str]
) -> None:
    """Compile a program into `package.pt2`.

    Args:
        program: made of the artefact.
        folder: the artefact's.
        shared: the program's tensors that lie in the artefact's files.
        words: further lines of the package's metadata.

    Raises:
        ArtefactError: the compiler fails; in one line.
    """
    held = persistent_tensors(program)
    known = set(_TYPES.values())
    names = [name for name in held if name in shared and shared[name].dtype in known]
    example = program.example()
    exported = export_module(
        _TablesAsInputs(program, names, [int(n) for n in words["limits"].split()]),
        (example, [held[name].detach() for name in names]),
        (open_sizes(example), [None] * len(names)),
    )
    metadata = {
        **{f"table.{n}": _line(shared[name]) for n, name in enumerate(names)},
        "tables": str(len(names)),
        "torch": _release(torch.__version__),
        "processor": " ".join(sorted(instruction_sets())),
        **words,
    }
    options = {
        "aot_inductor.metadata": metadata,
        "cpp.dynamic_threads": True,  # else the threads of this process are compiled in
    }
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(folder / PACKAGE_FILE), inductor_configs=options
            )
    except Exception as error:  # compilers, and torch around them, fail in many ways
        raise ArtefactError(
            f"AOTInductor could not compile the program: {one_line(error)}. Nothing was written; "
            "--format pt2 needs no compiler"
        ) from error


def _line(place: StoredTensor) -> str:
    kind = str(place.dtype).removeprefix("torch.")
    return " ".join([place.file.name, str(place.start), kind, *map(str, place.shape)])


def _release(version: str) -> str:
    return version.partition("+")[0]


class AotiPackage:
    """A loaded package: takes the program's inputs by name, and returns its outputs by name.

    Args:
        folder: the artefact's.

    Raises:
        ArtefactError: it was compiled for another torch or processor, or a file is missing.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / PACKAGE_FILE
        self.metadata = package_metadata(path)
        check_fits(self.metadata, path)
        runners = max(1, torch.get_num_threads())  # calls that may be answered at once
        self._loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, runners, -1)
        self._inputs = self.metadata["inputs"].split()
        self._outputs = self.metadata["outputs"].split("\t")
        self._maps: dict[str, Tensor] = {}
        count = int(self.metadata["tables"])
        self._tables = [self._mapped(folder, self.metadata[f"table.{n}"]) for n in range(count)]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run it.

        Args:
            inputs: contiguous tensors of the types and shapes that the artefact's description says;
                they are not checked here.

        Returns:
            By name; NaN for every row with an id that a method refuses.
        """
        given = [inputs[name].contiguous() for name in self._inputs]
        found = self._loader.boxed_run([*given, *self._tables])
        return dict(zip(self._outputs, found))

    def _mapped(self, folder: Path, line: str) -> Tensor:
        name, start, kind, *shape = line.split(" ")
        if name not in self._maps:
            self._maps[name] = _file_bytes(folder / name)
        dtype, sizes = _TYPES[kind], [int(size) for size in shape]
        nbytes = torch.Size(sizes).numel() * dtype.itemsize
        return self._maps[name][int(start) : int(start) + nbytes].view(dtype).view(sizes)


def _file_bytes(path: Path) -> Tensor:
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ArtefactError(
            f"{path}, which {PACKAGE_FILE} reads its tensors from, cannot be read: {error.strerror}; "
            "copy the whole folder"
        ) from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(content, dtype=torch.uint8)


def package_metadata(path: Path) -> dict[str, str]:
    """What a package says of itself, without loading its code.

    Raises:
        ArtefactError: it is no package.
    """
    loader: Any = torch._C._aoti.AOTIModelPackageLoader
    try:
        return dict(loader.load_metadata_from_package(str(path), "model"))
    except Exception as error:
        raise ArtefactError(
            f"{path} is no package of AOTInductor ({one_line(error)}); export the run again"
        ) from error


def check_fits(metadata: Mapping[str, str], path: Path) -> None:
    """Raise an ArtefactError unless a package was compiled for this torch and this processor.

    Args:
        metadata: as `package_metadata` reads it.
        path: the package, for errors.
    """
    here, wanted = _release(torch.__version__), metadata.get("torch", "unknown")
    if wanted != here:
        raise ArtefactError(
            f"{path} was compiled for torch {wanted}, and this is torch {here}; export the run again "
            f"with --format aoti here, or install torch {wanted}"
        )
    lacking = sorted(set(metadata.get("processor", "").split()) - instruction_sets())
    if lacking:
        more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
        raise ArtefactError(
            f"{path} was compiled for a processor with {', '.join(lacking[:_NAMED])}{more}, which this "
            "one has not; export the run again with --format aoti on such a machine as will serve it"
        )
