"""README for a package index, which shows it without the repository: relative links and pictures become absolute.

    python .ci/absolute_links.py URL-OF-THE-FILES < README.md

URL-OF-THE-FILES is where the files of the released tag can be read, such as the project's Source URL with its tag. It is
not written into the repository, as only the release knows it.
"""

import re
import sys

LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s]+)(\))")


def absolute(text: str, url: str) -> str:
    """``text`` with every relative Markdown target below ``url``; code blocks stay as they are."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    return "".join(
        part if part.startswith("```") else LINK.sub(lambda link: f"{link[1]}{url.rstrip('/')}/{link[2]}{link[3]}", part)
        for part in parts
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.stdout.write(absolute(sys.stdin.read(), sys.argv[1]))
