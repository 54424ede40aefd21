"""What a bare machine with a card lacks: the compiled kernels and the peers' wheels.

    make gpu-bundle                       here, without a GPU
    python3 benchmarks/card.py --out ...  there; it calls `bundle.py place`

The folder holds both shared objects (sm_80 and sm_90a, the CUTLASS GEMM among them), the wheels of
requirements/peers-gpu.txt for Python 3.12 on x86-64 Linux, and manifest.json with the hash of each
and of the sources. An object says itself what it was made from: its build id is `sources_hash` of
setup.py. A stale one is built again where there is a compiler, time stamps notwithstanding.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from journal import Journal

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = ("_C", "_CUDA")
ARCHITECTURES = "8.0;9.0a"
LIMIT = 60_000_000  # bytes
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
NOTE = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0"  # the ELF note that holds 20 bytes of build id


class BundleError(Exception):
    """What keeps the bundle from being made or used, and the fix."""


def wanted() -> dict[str, str]:
    """What setup.py says that each object is made from."""
    here = Path.cwd()
    os.chdir(ROOT)  # it names its sources relative to itself
    try:
        sources_hash: Callable[[str], str] = runpy.run_path("setup.py")["sources_hash"]
        return {name: sources_hash(name) for name in OBJECTS}
    finally:
        os.chdir(here)


def built_from(path: Path) -> str | None:
    """The hash of the sources that an object was made from; None where it does not say."""
    if not path.exists():
        return None
    _, found, rest = path.read_bytes().partition(NOTE)
    return rest[:20].hex() if found else None


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make(out: Path, *, wheels: bool) -> None:
    """Raises BundleError where something of it cannot be made."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "wheels").mkdir(parents=True)
    build(out)
    if wheels:
        download(out / "wheels")
    hashes = wanted()
    for name in OBJECTS:
        if built_from(out / f"{name}.abi3.so") != hashes[name]:
            raise BundleError(f"the sources of {name} changed while it was built: try again")
    objects = {
        f"{name}.abi3.so": {
            "sha256": sha256(out / f"{name}.abi3.so"),
            "sources": hashes[name],
            "architectures": ARCHITECTURES if name == "_CUDA" else "x86-64",
        }
        for name in OBJECTS
    }
    wheels_made = {path.name: sha256(path) for path in sorted((out / "wheels").iterdir())}
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    manifest = {"objects": objects, "wheels": wheels_made, "python": "3.12", "made": made}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    sizes = sorted((p.stat().st_size, p.name) for p in out.rglob("*") if p.is_file())
    total = sum(size for size, _ in sizes)
    if total > LIMIT:
        raise BundleError(
            f"{out} has {total:,} bytes, more than {LIMIT:,}; the largest file is {sizes[-1][1]} "
            f"({sizes[-1][0]:,}): take it out of requirements/peers-gpu.txt"
        )
    print(f"{out}: {total:,} bytes in {len(sizes)} files")


def build(out: Path) -> None:
    """Both objects, from the sources as they are."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder]
        command += ["--build-temp", f"{folder}/temp"]
        environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": ARCHITECTURES}
        environment.pop("LOLKERNELS_BUILD_CUDA", None)
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
        said = [line for line in done.stderr.splitlines() if "built without" in line]
        for name in OBJECTS:
            made = Path(folder) / "lolkernels" / f"{name}.abi3.so"
            if not made.exists() or said:
                text = said[0] if said else done.stderr[-600:]
                raise BundleError(f"{name} is not whole: {text}")
            shutil.copyfile(made, out / made.name)


def download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--require-hashes", "--only-binary=:all:", "--python-version", "3.12"]
    command += ["--implementation", "cp", "--abi", "cp312", "--abi", "abi3", "--abi", "none"]
    command += [word for name in PLATFORMS for word in ("--platform", name)]
    command += ["-d", str(folder), "-r", str(ROOT / "requirements" / "peers-gpu.txt")]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise BundleError(f"the wheels cannot be had: {done.stderr[-600:]}")
    for path in sorted(folder.glob("*.whl")):
        if path.stat().st_size > LIMIT // 4:
            repack(path)


def repack(path: Path) -> None:
    """A large wheel as a stored archive under xz, which is a third smaller."""
    packed = path.with_name(path.name + ".xz")
    with tempfile.TemporaryFile() as plain:
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(plain, "w") as target:
            for name in source.namelist():
                if not name.endswith(".a") and "/stubs/" not in name:
                    target.writestr(name, source.read(name))
        plain.seek(0)
        with lzma.open(packed, "wb", preset=6) as file:
            shutil.copyfileobj(plain, file, 2**20)
    path.unlink()


def unpack(path: Path, folder: Path) -> None:
    opened = lzma.open if path.suffix == ".xz" else open
    with tempfile.TemporaryFile() as plain, opened(path, "rb") as file:
        shutil.copyfileobj(file, plain, 2**20)
        with zipfile.ZipFile(plain) as archive:
            archive.extractall(folder)


def place(bundle: Path, wheels: Path, journal: Journal, *, building: bool, compiler: bool) -> None:
    """Puts the objects into the package and what wheels hold there; each says how it went."""
    path, manifest = bundle / "manifest.json", {"wheels": {}}
    if path.exists():
        manifest = json.loads(path.read_text())
    for name, digest in manifest["wheels"].items():
        attempt(journal, f"wheel {name}", partial(wheel, bundle, wheels, name, digest))
    hashes, how = wanted(), {"building": building, "compiler": compiler}
    for name in OBJECTS:
        step = partial(place_object, name, hashes[name], bundle, **how)
        attempt(journal, f"object {name}", step)


def attempt(journal: Journal, task: str, step: Callable[[], str]) -> None:
    journal.write("begin", job="prepare", task=task, limit=200.0)
    began = time.monotonic()
    try:
        text = step()
    except Exception as error:  # whatever it fails with, the rest goes on
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        journal.write("fault", job="prepare", task=task, reason=reason, text="")
    else:
        seconds = round(time.monotonic() - began, 1)
        journal.write("result", job="prepare", task=task, seconds=seconds, text=text)


def wheel(bundle: Path, folder: Path, name: str, digest: str) -> str:
    path = bundle / "wheels" / name
    if not path.exists():
        raise BundleError(f"{name} is missing from {bundle.name}")
    if sha256(path) != digest:
        raise BundleError(f"{name} is not the file that the manifest names: make gpu-bundle")
    unpack(path, folder)
    return "unpacked"


def place_object(name: str, want: str, bundle: Path, *, building: bool, compiler: bool) -> str:
    target, carried = ROOT / "lolkernels" / f"{name}.abi3.so", bundle / f"{name}.abi3.so"
    if built_from(target) == want:
        return "there, from these sources"
    if built_from(carried) == want:
        shutil.copyfile(carried, target)
        return "carried, from these sources"
    if building and compiler:
        run_build()
        if built_from(target) == want:
            return "built here"
        raise BundleError(f"{target.name} could not be built: log.txt has the compiler's words")
    if not target.exists() and carried.exists():
        shutil.copyfile(carried, target)
    text = "was made from other sources" if target.exists() else "is neither here nor carried"
    if compiler:
        raise BundleError(f"{target.name} {text}: make gpu-bundle")
    return text


def run_build() -> None:
    """Builds in place for the card that is here."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    said = subprocess.run(query, text=True, capture_output=True).stdout.split()
    number = said[0] if said and re.fullmatch(r"\d+\.\d", said[0]) else "9.0"
    target = f"{number}a" if number.startswith("9.") else number
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {"TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or target}
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, timeout=200)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["make", "place"])
    parser.add_argument("--bundle", type=Path, default=ROOT / "gpu-bundle")
    parser.add_argument("--no-wheels", action="store_true", help="make: the objects alone")
    for name in ("--out", "--run", "--device", "--wheels"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--no-build", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    given = parse(argv)
    if given.verb == "place":
        journal, on_card = Journal(Path(given.out), given.run), given.device == "cuda"
        wheels, building = Path(given.wheels), not given.no_build
        place(given.bundle, wheels, journal, building=building, compiler=on_card)
        return 0
    try:
        make(given.bundle, wheels=not given.no_wheels)
    except BundleError as error:
        print(f"gpu-bundle: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
