"""Repacks PyPI's torchaudio wheel without its CUDA-linked libraries, as version X+cpu (see setup.sh).

python launch/setup/repack_torchaudio.py torchaudio-2.11.0-….whl OUT_FOLDER
"""

from __future__ import annotations

import base64
import hashlib
import sys
import zipfile
from pathlib import Path


def repack(wheel: Path, folder: Path) -> Path:
    """Writes the repacked wheel into `folder` and returns its path."""
    name, version, *tags = wheel.name.split("-")
    new_version = f"{version}+cpu"
    info, new_info = f"{name}-{version}.dist-info/", f"{name}-{new_version}.dist-info/"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "-".join([name, new_version, *tags])
    record = []
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for path in old.namelist():
            if path.endswith((".so", "/", "/RECORD")):
                continue
            data = old.read(path)
            if path == f"{info}METADATA":
                data = data.replace(f"\nVersion: {version}\n".encode(), f"\nVersion: {new_version}\n".encode(), 1)
            path = path.replace(info, new_info, 1)
            new.writestr(path, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append(f"{path},sha256={digest},{len(data)}")
        record.append(f"{new_info}RECORD,,")
        new.writestr(f"{new_info}RECORD", "\n".join(record) + "\n")
    return target


if __name__ == "__main__":
    print(repack(Path(sys.argv[1]), Path(sys.argv[2])))
