"""README for a package index, which shows it without the repository: relative links and pictures become absolute.

    python .ci/absolute_links.py URL-OF-THE-FILES < README.md

URL-OF-THE-FILES is where the files of the released tag can be read: the project's Source URL with the tag. Only the
release knows it, so it is not written into the repository.
"""

import re
import sys

LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s]+)(\))")


def absolute(text: str, url: str) -> str:
    """``text`` with every relative Markdown target below ``url``; code blocks stay as they are."""
    target = rf"\g<1>{url.rstrip('/')}/\g<2>\g<3>"
    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else LINK.sub(target, part) for part in parts)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.stdout.write(absolute(sys.stdin.read(), sys.argv[1]))
