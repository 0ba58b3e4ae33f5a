"""The pinned npm packages that the emoji corpus is made from."""

import hashlib
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """An npm package the corpus is made from; `sha256` is of the tarball that `npm pack` writes."""

    name: str
    version: str
    sha256: str


PACKAGES = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "noto_v1": Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    "fluent": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "unicode": Package(
        "unicode-emoji-json",
        "0.9.0",
        "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
    ),
    "cldr": Package(
        "cldr-annotations-full",
        "48.2.0",
        "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
    ),
    "emojibase": Package(
        "emojibase-data",
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
}


def fetch(package: Package, work_dir: Path) -> Path:
    """Download and unpack one package; what is already there is used again.

    Returns:
        The folder of the unpacked package.
    """
    spec = f"{package.name}@{package.version}"
    target = work_dir / re.sub(r"[^a-z0-9.]+", "-", spec).strip("-")
    target.mkdir(parents=True, exist_ok=True)
    if not list(target.glob("*.tgz")):
        command = ["npm", "pack", spec, "--silent", "--pack-destination", str(target)]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        except FileNotFoundError:
            raise ValueError(
                "`npm` is not on the PATH; install Node.js to rebuild the corpus"
            ) from None
        except subprocess.CalledProcessError as error:
            raise ValueError(
                f"`{' '.join(command)}` failed with status {error.returncode}"
            ) from None
    (tarball,) = target.glob("*.tgz")
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(
            f"{tarball} has sha256 {digest}, expected {package.sha256}; delete it and try again"
        )
    with tarfile.open(tarball) as archive:
        archive.extractall(target, filter="data")
    return target / "package"
