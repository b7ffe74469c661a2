"""What ``pyproject.toml`` cannot say.

- The source distribution keeps the symbolic links of the repository, so that it is the repository and its tests run.
- ``KVOPS_PROJECT_URL`` names the public address of the repository when a release is built. It becomes the project's
  URLs, and the README's links and pictures, which are relative here, become absolute for the package index.
"""

import os
import re
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
# src/kvops -> ../kvops, kvops/kernels -> ../kernels, kvops/autotune -> ../autotune
LINKS = [path for path in ("src/kvops", "kvops/kernels", "kvops/autotune") if (ROOT / path).is_symlink()]
URL = os.environ.get("KVOPS_PROJECT_URL", "").rstrip("/")
PAGES = {"Source": "", "Documentation": "/tree/main/docs", "Changelog": "/blob/main/CHANGELOG.md", "Issues": "/issues"}


class LinkedSdist(sdist):
    """Setuptools would write a copy of the files behind each link."""

    def make_release_tree(self, base_dir, files):
        behind_links = tuple(f"{link}/" for link in LINKS)
        super().make_release_tree(base_dir, [file for file in files if not file.startswith(behind_links)])
        for link in LINKS:
            copy = Path(base_dir, link)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(os.readlink(ROOT / link))


def readme() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if not URL:
        return text
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:)", rf"\1{URL}/raw/main/", text)
    return re.sub(r"(?<!!)(\[[^\]!]*\]\()(?!https?:|#)", rf"\1{URL}/blob/main/", text)


setup(
    cmdclass={"sdist": LinkedSdist},
    long_description=readme(),
    long_description_content_type="text/markdown",
    project_urls={name: URL + page for name, page in PAGES.items()} if URL else {},
)
