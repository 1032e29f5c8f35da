"""Packaging of MMSora. Imports setuptools alone, so that any pip can build it in isolation."""

import contextlib
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
SHIPPED = ("configs", "tools")  # found by mim, and by `mmsora`, under mmsora/.mim


class BuildWithMim(build_py):
    """Adds configs and tools: copies in a wheel, links to the checkout in an editable install."""

    def run(self) -> None:
        """Builds the package, then its ``.mim`` folder."""
        super().run()
        for name in SHIPPED:
            if self.editable_mode:
                self.link(name)
            else:
                shutil.copytree(
                    ROOT / name,
                    Path(self.build_lib, "mmsora", ".mim", name),
                    ignore=shutil.ignore_patterns("__pycache__"),
                    dirs_exist_ok=True,
                )

    def link(self, name: str) -> None:
        """Links ``mmsora/.mim/<name>`` to the folder of the checkout."""
        place = ROOT / "mmsora" / ".mim" / name
        place.parent.mkdir(exist_ok=True)
        place.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # Windows without the right to link: mim finds nothing
            place.symlink_to(Path("..", "..", name), target_is_directory=True)


def version() -> str:
    """The version, read without importing the package."""
    text = (ROOT / "mmsora" / "version.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "(.+)"', text)[1]


def requirements(name: str) -> list[str]:
    """The lines of ``requirements/<name>.txt`` without its comments."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


EXTRAS = {name: requirements(name) for name in ("optional", "tests", "docs")}

setup(
    name="mmsora",
    version=version(),
    description="A toolbox for video diffusion in the style of OpenMMLab",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The MMSora Authors",
    license="Apache-2.0",
    keywords="video generation, diffusion, rectified flow, transformer",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["mmsora", "mmsora.*"]),
    package_data={"mmsora": ["py.typed", "visualization/*.css", "visualization/*.js"]},
    install_requires=requirements("runtime"),
    extras_require={**EXTRAS, "all": sum(EXTRAS.values(), [])},
    entry_points={"console_scripts": ["mmsora=mmsora.cli:main"]},
    cmdclass={"build_py": BuildWithMim},
    zip_safe=False,
)
