"""Git LFS pointers: small text files that stand for large ones in a repository that was cloned without Git LFS.

Knows no format of models or adapters. Used by all readers of their files.
"""

POINTER_BYTES = 1024  # the specification: a pointer is smaller than this
_MAGIC = b"version https://git-lfs.github.com/spec/"
# Completes "NAME is …".
POINTER_PROBLEM = (
    "a Git LFS pointer and not the file itself: the repository was cloned without Git LFS; run `git lfs pull` in it, "
    "or download the files"
)


def is_lfs_pointer(data: bytes) -> bool:
    """Whether a file that starts with these bytes is a pointer; its first 64 bytes are enough."""
    return data.startswith(_MAGIC)
