"""The source lines that the instructions of a compiled program were created from."""

import re


class SourceLines:
    """The tables before a module's computations: for each stack frame its file, its line and its caller."""

    def __init__(self, text: str):
        head = text[: text.find("\n%")]
        tables = re.split(r"^(FileNames|FunctionNames|FileLocations|StackFrames)$", head, flags=re.MULTILINE)
        table = dict(zip(tables[1::2], tables[2::2], strict=True))

        def rows(name: str, pattern: str) -> list[tuple[str, ...]]:
            return re.findall(pattern, table.get(name, ""), re.MULTILINE)

        files = {file: name for file, name in rows("FileNames", r'^(\d+) "(.*)"$')}
        locations = rows("FileLocations", r"^(\d+) \{file_name_id=(\d+).*? line=(\d+)")
        self.locations = {location: (files[file], line) for location, file, line in locations}
        frames = rows("StackFrames", r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)")
        self.frames = {frame: (location, parent) for frame, location, parent in frames}

    def line(self, metadata: str) -> str:
        """`file.py:line` of the innermost frame outside of installed packages; empty if there is none."""
        if direct := re.search(r'source_file="([^"]*)" source_line=(\d+)', metadata):
            return _short(*direct.groups())
        found = re.search(r"stack_frame_id=(\d+)", metadata)
        frame = found.group(1) if found else ""
        while frame in self.frames:
            location, parent = self.frames[frame]
            if "site-packages" not in self.locations[location][0]:
                return _short(*self.locations[location])
            frame = parent if parent != frame else ""
        return ""


def _short(file: str, line: str) -> str:
    return f"{file.rpartition('/')[2]}:{line}"
