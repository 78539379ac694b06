"""Reading a checkpoint: its tensors by name, in file order, and their bytes by ranges.

safetensors files are read with ``pread`` into the caller's buffers; no file is mapped. ``.bin`` files go
through torch's weights-only loader, which maps them and refuses every pickle that is more than tensors.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seme import dtypes, native
from seme.checkpoint.descriptors import Descriptors
from seme.checkpoint.index import read_json, weight_files
from seme.checkpoint.safetensors import Stored, check_name, read_header
from seme.errors import CheckpointError, SemeError, brief, reason

if TYPE_CHECKING:
    import numpy as np
    import torch

    Int64 = np.ndarray[Any, np.dtype[np.int64]]


class Reader:
    """Reads tensors of safetensors files from where they lie. The files stay open until :meth:`close`."""

    def __init__(self) -> None:
        self._descriptors = Descriptors(os.O_RDONLY)

    def read_into(self, tensor: Stored, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of ``tensor`` from byte ``start`` on. Safe from many threads.

        Raises:
            CheckpointError: the file ended early, or the read failed.
        """
        with self._open(tensor) as descriptor:
            done, want = 0, len(buffer)
            while done < want:  # one call gives at most 2 GiB
                got = os.preadv(descriptor, [buffer[done:] if done else buffer], tensor.offset + start + done)
                if got == 0:
                    raise _ends_early(tensor, descriptor, start + want)
                done += got

    @contextmanager
    def _open(self, tensor: Stored) -> Iterator[int]:
        """The descriptor of a tensor's file; a read that fails in the block is an error that names both."""
        try:
            with self._descriptors.use(tensor.file) as descriptor:
                yield descriptor
        except OSError as e:
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name}: read failed: {reason(e)}", fault=True) from e

    def close(self) -> None:
        """Close the files."""
        self._descriptors.close()


class Checkpoint(Reader):
    """An open checkpoint folder (or a single ``.safetensors`` / ``.bin`` file).

    Attributes:
        path: the folder.
        tensors: every tensor by name, in the order of the files and their data.
        config: contents of ``config.json``; empty if there is none.
        files: the weight files.
    """

    def __init__(self, path: Path) -> None:
        """Read headers, index and config; no tensor data.

        Raises:
            CheckpointError: anything missing, truncated, hostile or contradictory, with the file's name.
        """
        super().__init__()
        if path.is_file():
            self.path, self.files, weight_map = path.parent, [path], None
        elif path.is_dir():
            self.path = path
            self.files, weight_map = weight_files(path)
        else:
            raise CheckpointError(f"{path}: no such folder")
        self.config: dict[str, Any] = {}
        if (self.path / "config.json").is_file():
            self.config = read_json(self.path / "config.json")
        self._loaded: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()
        self._asked: set[str] = set()  # tensors of which the file was asked for all
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            listed = read_header(file) if file.suffix == ".safetensors" else self._load_pickle(file)
            for t in listed:
                if weight_map is not None and t.name not in weight_map:
                    raise CheckpointError(f"{file}: tensor {t.name} is not in the index; rebuild the index")
                if weight_map is not None and weight_map[t.name] != file.name:
                    continue
                self.tensors[t.name] = t
        for name in weight_map or {}:
            if weight_map is not None and name not in self.tensors:
                raise CheckpointError(
                    f"{self.path / weight_map[name]}: tensor {name} is missing, the index lists it here"
                )
        if not self.tensors:
            raise CheckpointError(f"{self.path}: no tensors in {', '.join(f.name for f in self.files)}")

    def _load_pickle(self, file: Path) -> list[Stored]:
        import warnings
        import zipfile

        import torch

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a pickle that is then refused in one line
                # Files from before torch 1.6 are no zip archives and cannot be mapped.
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as e:
            said = str(e).splitlines()[0][:300] if str(e) else type(e).__name__
            raise CheckpointError(
                f"{file}: refused by the weights-only loader ({said}); convert it to safetensors where you trust it"
            ) from e
        state = state.get("state_dict", state) if isinstance(state, dict) else state
        listed = []
        for name, tensor in state.items() if isinstance(state, dict) else ():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
                raise CheckpointError(f"{file}: entry {brief(name)} is not a dense tensor with a name")
            check_name(file, name)
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise CheckpointError(f"{file}: tensor {name} repeats its elements; store it contiguously")
            try:
                dtype = dtypes.from_torch(tensor.dtype)
            except SemeError as e:
                raise CheckpointError(f"{file}: tensor {name}: {e}") from e
            self._loaded[name] = tensor.detach()
            listed.append(Stored(name, dtype, tuple(tensor.shape), file, 0, tensor.numel() * dtype.itemsize))
        return listed

    def memory(self, name: str) -> tuple[int, int] | None:
        """Where a tensor of a ``.bin`` checkpoint begins, (storage, element); tied weights begin at one place."""
        if name not in self._loaded:
            return None
        tensor = self._loaded[name]
        return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())

    def read_into(self, tensor: Stored, start: int, buffer: memoryview) -> None:
        """As :meth:`Reader.read_into`, of ``.bin`` files too."""
        if tensor.name in self._loaded:
            self._copy_loaded(tensor.name, start, buffer)
        else:
            super().read_into(tensor, start, buffer)

    def read_runs(self, tensor: Stored, starts: Int64, places: Int64, sizes: Int64, buffer: memoryview) -> None:
        """Read many short runs of bytes at once, ``sizes`` bytes each, from ``starts`` in the tensor to ``places`` in
        the buffer.

        The file is asked for the whole tensor first: short reads here and there take a disk much longer than one long
        one, and find it in the page cache then.

        Raises:
            CheckpointError: as :meth:`read_into`.
        """
        if tensor.name in self._loaded or native.why_not("_C") is not None:
            for start, place, size in zip(starts.tolist(), places.tolist(), sizes.tolist()):
                self.read_into(tensor, start, buffer[place : place + size])
            return
        offsets = starts + tensor.offset
        memory = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if buffer else 0
        arrays = [a.ctypes.data for a in (offsets, places, sizes)]
        with self._open(tensor) as descriptor:
            if tensor.name not in self._asked and hasattr(os, "posix_fadvise"):
                self._asked.add(tensor.name)
                os.posix_fadvise(descriptor, tensor.offset, tensor.nbytes, os.POSIX_FADV_WILLNEED)
            done, error = native.module().read_runs(descriptor, len(sizes), *arrays, memory, len(buffer))
            if error:
                raise OSError(error, os.strerror(error))
            if done < len(sizes):
                raise _ends_early(tensor, descriptor, int(starts[done] + sizes[done]))

    def _copy_loaded(self, name: str, start: int, buffer: memoryview) -> None:
        import torch

        tensor = self._loaded[name]
        size = tensor.element_size()
        if not tensor.is_contiguous():
            with self._lock:
                tensor = self._loaded[name] = self._loaded[name].contiguous()
        flat = tensor.view(-1)[start // size : (start + len(buffer)) // size]
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(flat.view(torch.uint8))

    def close(self) -> None:
        """Close the files."""
        super().close()
        self._loaded.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _ends_early(tensor: Stored, descriptor: int, end: int) -> CheckpointError:
    missing = tensor.offset + end - os.fstat(descriptor).st_size
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name}: ends {missing} bytes early; was it changed?", fault=True
    )
