"""Files that are mistaken for checkpoints, recognised by their first bytes."""

from pathlib import Path

_BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer instead of the file; fetch the file itself with git lfs pull",
    b"<!doctype html": "an HTML page instead of the file; download the file itself",
    b"<html": "an HTML page instead of the file; download the file itself",
    b"<?xml": "an XML page instead of the file; download the file itself",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"\x89HDF": "an HDF5 file, as Keras writes; save its arrays with numpy.savez",
    b"GGUF": "a GGUF file; convert the checkpoint that it was made from",
}


def check_kind(path: Path) -> None:
    """Raises ValueError if a file begins like a file that is often mistaken for a checkpoint with this extension."""
    with path.open("rb") as file:
        start = file.read(512)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, what in _BEGINNINGS.items():
        if start.startswith(beginning) or text.startswith(beginning):
            raise ValueError(f"checkpoint: {path} is {what}.")
    if start[257:262] == b"ustar":
        raise ValueError(f"checkpoint: {path} is a tar archive; unpack it first.")
    header = int.from_bytes(start[:8], "little")
    if path.suffix == ".safetensors" and start.startswith(b"PK\x03\x04"):
        raise ValueError(f"checkpoint: {path} is a zip archive, as PyTorch writes; end its name in .pt.")
    if path.suffix != ".safetensors" and start[8:9] == b"{" and header <= path.stat().st_size - 8:
        raise ValueError(f"checkpoint: {path} is a safetensors file; end its name in .safetensors.")
