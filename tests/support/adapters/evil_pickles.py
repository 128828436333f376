"""Pickles and archives that run code, swell, or lie, where somebody trusts them: what attackers and bad tools send."""

import collections
import io
import os
import pickle
import subprocess
import zipfile

import numpy as np
import torch

from guanaco.adapters.convert.torch_pickle import MAX_PICKLE_BYTES


class Call:
    """Unpickling one calls a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Build:
    """Unpickling one imports its module and sets attributes."""

    def __init__(self, canary):
        self.canary = canary


def zipped(data, compression=zipfile.ZIP_STORED, **members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


class Reference:
    """Pickled as torch pickles a tensor of `shape` over storage 0 of `count` elements."""

    def __init__(self, shape, strides, count, offset=0):
        self.arguments = (("storage", torch.FloatStorage, "0", "cpu", count), offset, shape, strides)

    def __reduce__(self):
        storage, *rest = self.arguments
        return torch._utils._rebuild_tensor_v2, (Storage(storage), *rest, False, collections.OrderedDict())


class Storage:
    def __init__(self, reference):
        self.reference = reference


class StoragePickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.reference if isinstance(value, Storage) else None


def tensor_file(*reference, data=b"\0" * 64):
    buffer = io.BytesIO()
    StoragePickler(buffer, protocol=2).dump({"x": Reference(*reference)})
    return zipped(buffer.getvalue(), **{"data/0": data})


def evil_files(canary):
    """name → (code, content): what attackers and bad tools send."""
    shell = f"touch {canary}"
    calls = {
        "system": Call(os.system, shell),
        "eval": Call(eval, f"open({str(canary)!r}, 'w')"),
        "open": Call(open, str(canary), "w"),
        "popen": Call(subprocess.Popen, ["touch", str(canary)]),
        "import": Call(__import__, "os"),
        "built": Build(str(canary)),
        "numpy_array": np.zeros(3),
        "python_type": int,
    }
    for name, value in calls.items():
        for protocol in (0, 2, 4):
            data = pickle.dumps({"x": value}, protocol=protocol)
            yield f"{name}_{protocol}", ("unsafe_pickle", zipped(data))
    yield "bare_pickle", ("unsafe_pickle", pickle.dumps(Call(os.system, shell), protocol=2))
    yield "instance", ("unsafe_pickle", zipped(b"(S'touch'\nios\nsystem\n."))
    yield "object", ("unsafe_pickle", zipped(b"(cos\nsystem\nS'touch'\no."))
    yield "extension", ("unsafe_pickle", zipped(b"\x80\x02\x82\x01."))
    yield "jit_code", ("unsafe_pickle", zipped(b"\x80\x02c__torch__\nModule\n)\x81."))
    yield "ordered_dict_call", ("bad_pickle", zipped(b"\x80\x02ccollections\nOrderedDict\nX\x01\0\0\0a\x85R."))
    yield "function_itself", ("not_tensors", zipped(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n."))
    yield "empty_stack", ("bad_pickle", zipped(b"\x80\x02R."))
    yield "below_mark", ("bad_pickle", zipped(b"\x80\x02}(R."))
    yield "no_mark", ("bad_pickle", zipped(b"\x80\x02u."))
    yield "no_memo", ("bad_pickle", zipped(b"\x80\x02h\x05."))
    yield "no_stop", ("bad_pickle", zipped(b"\x80\x02}"))
    yield "huge_string", ("bad_pickle", zipped(b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"x."))
    yield "huge_integer", ("bad_pickle", zipped(b"I" + b"9" * 100_000 + b"\n."))
    yield "structure_too_large", ("bad_pickle", zipped(b"\x80\x02" + b"N" * (MAX_PICKLE_BYTES + 1) + b"."))
    yield "compressed", ("bad_pickle", zipped(b"\x80\x02N" * 1000 + b".", zipfile.ZIP_DEFLATED))
    yield "no_table", ("not_tensors", zipped(pickle.dumps([1, 2], protocol=2)))
    yield "checkpoint", ("not_tensors", zipped(pickle.dumps({"epoch": 3}, protocol=2)))
    yield "nested", ("not_tensors", zipped(pickle.dumps({"model": {"x": 1}}, protocol=2)))
    yield "list_in_itself", ("not_tensors", zipped(b"\x80\x02]q\0h\0a."))
    yield "empty_table", ("empty", zipped(pickle.dumps({}, protocol=2)))
    yield "no_data", ("bad_pickle", tensor_file((4, 4), (4, 1), 17))
    yield "expanded", ("file_too_large", tensor_file((2**20, 2**20), (0, 0), 16))
    yield "beyond", ("bad_pickle", tensor_file((4, 4), (8, 1), 16))
    yield "offset_beyond", ("bad_pickle", tensor_file((4, 4), (4, 1), 16, 1))
    yield "negative_offset", ("bad_pickle", tensor_file((4, 4), (4, 1), 16, -1))
    yield "negative_stride", ("bad_pickle", tensor_file((4, 4), (-4, 1), 16))
    yield "negative_shape", ("bad_pickle", tensor_file((-4, -4), (4, 1), 16))
    yield "strides_missing", ("bad_pickle", tensor_file((4, 4), (4,), 16))
    yield "zero_rows", ("empty_tensor", tensor_file((0, 4), (4, 1), 16))
    yield "terabytes", ("file_too_large", tensor_file((2**40,), (1,), 2**40))
    yield "damaged_zip", ("bad_pickle", tensor_file((4, 4), (4, 1), 16)[:-30])
    yield "text", ("bad_pickle", b"These are no weights.\n")
    yield "nothing", ("bad_pickle", b"")


EVIL = list(dict(evil_files("canary")))
