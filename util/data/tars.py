"""Images in uncompressed .tar files: members by their place, links between them, and the split that lies in them."""

from __future__ import annotations

import itertools
import os
import tarfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from util.data.formats import is_hidden, is_image
from util.data.listing import Listing, class_by_folder, name_of, number_classes
from util.data.shards import read_shard
from util.data.sources import TarSource, check_descriptors
from util.data.splits import matching_names, split_kind, the_one, without_training_images
from util.runtime.errors import UserError

MOST_LINKS_IN_A_ROW = 40  # as Linux follows
MOST_PATHS_PER_MEMBER = 100  # through links to folders


def open_tars(root: Path, tars: Sequence[Path], split: str, flag: str, is_split: bool) -> TarSource:
    """Open the image files in .tar files, below train/ (or val/) where there is one; classes are folders, as on disk.

    Args:
        root: what the user gave, for messages.
        is_split: they are one split, whose folders are classes, whatever they are called.

    Raises:
        UserError: see `list_tars` and `Listing.check`; or the .tar files are shards of several data sets.
    """
    listing, classes = list_tars(tars, flag)
    if classes is None:  # folders of a prepared shard are classes of these names
        inside = {name: splits_of(listing.images, name, flag, root) for name in ("train", "val")}
        if not is_split or all(inside.values()):
            if split == "train" and inside["val"] and not inside["train"]:
                raise without_training_images(flag, root, name_of(inside["val"]))
            if inside[split]:
                listing.keep_below(inside[split])
                is_split = True
    listing.check(flag, root, is_split or classes is not None)
    class_of = (
        class_by_folder(listing.images) if classes is None else {folder: name_of(folder) for folder in listing.images}
    )
    if unlisted := set(class_of.values()) - set(class_of.values() if classes is None else classes):
        raise UserError(f"{flag} {root}: holds shards of several data sets, only one has a class {min(unlisted)!r}")
    labelled = sorted((member, class_of[folder]) for folder, members in listing.images.items() for member in members)
    return TarSource([member for member, _ in labelled], *number_classes([name for _, name in labelled], classes))


def holds_validation(tars: Sequence[Path], flag: str, root: Path) -> bool:
    """Return True if validation images lie in the .tar files, in a folder of their own."""
    listing, classes = list_tars(tars, flag)
    return classes is None and splits_of(listing.images, "val", flag, root) is not None


def splits_of(folders: Iterable[str], split: str, flag: str, root: Path) -> str | None:
    """Return the folder of a split among those of a .tar: at its top, or in a folder around all of it; or None."""
    paths = {tuple(folder.split("/")) if folder else () for folder in folders}
    same = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    around = [names[0] for names in same]
    level = next((depth for depth, name in enumerate(around) if split_kind(name)), len(around))
    inside = {path[level]: "/".join(path[: level + 1]) for path in paths if len(path) > level}
    name = the_one(matching_names(inside, split), flag, root)
    return inside[name] if name else None


def list_tars(tars: Sequence[Path], flag: str) -> tuple[Listing, list[str] | None]:
    """List the images of .tar files, as (tar, name, offset, bytes); and the classes that a shard's manifest names.

    Raises:
        UserError: a .tar, or a manifest, cannot be read.
    """
    listing, classes = Listing(), None
    for tar in tars:
        shard = read_shard(tar)
        if shard is None:
            list_tar(tar, flag, listing)
            continue
        classes = shard.classes if classes is None else classes
        for name, offset, size in shard.members:
            listing.images.setdefault(name.rpartition("/")[0], []).append((str(tar), name, offset, size))
    return listing, classes


def list_tar(tar: Path, flag: str, listing: Listing) -> None:
    """Add what lies in a .tar to a listing, as if it were unpacked: of equal names the last one counts."""
    contents = read_headers(tar, flag)
    hidden_at: dict[str, str] = {}  # the topmost hidden folder on the way to a folder, or ""
    for path, member in contents.files() if contents.links else contents.members.items():
        folder, _, name = path.rpartition("/")
        if folder not in hidden_at:
            parts = folder.split("/")
            depth = next((depth for depth, part in enumerate(parts) if is_hidden(part)), None)
            hidden = "" if depth is None else "/".join(parts[: depth + 1])
            if hidden and hidden not in hidden_at.values():  # counted once, as in a folder
                listing.pass_over(*hidden.rpartition("/")[::2])
            hidden_at[folder] = hidden
        if hidden_at[folder]:
            continue
        if is_image(name):
            listing.images.setdefault(folder, []).append((str(tar), *member))
        else:
            listing.pass_over(folder, name)


@dataclass
class Contents:
    """Members of a .tar by their paths, as "a/b" without "./" or "/" in front."""

    tar: Path
    flag: str
    members: dict[str, tuple[str, int, int]] = field(default_factory=dict)  # name as written, offset, bytes
    links: dict[str, str] = field(default_factory=dict)  # target of each symbolic link, as written
    hard_links: dict[str, str] = field(default_factory=dict)  # target of each hard link, from the top

    def files(self) -> Iterator[tuple[str, tuple[str, int, int]]]:
        """Yield all files by their paths, links followed.

        Raises:
            UserError: a link leaves the .tar or leads to nothing or in a circle.
        """
        inside: dict[str, set[str]] = {}
        for path in itertools.chain(self.members, self.links):
            while path:
                folder, _, name = path.rpartition("/")
                names = inside.setdefault(folder, set())
                if name in names:
                    break
                names.add(name)
                path = folder
        number, most = 0, MOST_PATHS_PER_MEMBER * (len(self.members) + len(self.links))
        waiting: list[tuple[str, str, tuple[str, ...]]] = [("", "", ())]  # folder, its path, folders above it
        while waiting:
            folder, shown, above = waiting.pop()
            if folder in above:
                raise self.error(shown, "a link leads back to a folder around it")
            for name in inside[folder]:
                target, path = f"{folder}/{name}".lstrip("/"), f"{shown}/{name}".lstrip("/")
                if target in self.links and not is_hidden(name):
                    target = self.resolve(target)
                if (number := number + 1) > most:
                    raise self.error(path, "links to folders multiply the files")
                if target in self.members:
                    member = self.members[target]
                    yield path, member if path == target else (path, *member[1:])
                elif target in inside:
                    waiting.append((target, path, (*above, folder)))
                elif target not in self.links:
                    raise self.error(path, f"leads to {target}, which is not in it")

    def resolve(self, path: str) -> str:
        """Return where a path ends once all symbolic links on it are followed."""
        real: list[str] = []
        parts, hops = deque(path.split("/")), 0
        while parts:
            part = parts.popleft()
            if part == ".." and not real:
                raise self.error(path, "leads out of it")
            if part == "..":
                real.pop()
            elif part not in ("", "."):
                real.append(part)
            current = "/".join(real)
            if part not in ("", ".", "..") and current in self.links:
                hops += 1
                if hops > MOST_LINKS_IN_A_ROW:
                    raise self.error(path, "leads in a circle")
                if self.links[current].startswith("/"):
                    raise self.error(path, "leads out of it")
                real.pop()
                parts.extendleft(reversed(self.links[current].split("/")))
        return "/".join(real)

    def error(self, path: str, reason: str) -> UserError:
        """Return the error for a link that cannot be followed."""
        return UserError(f"{self.flag} {self.tar}: its link {path} {reason}; pack it again with --dereference")


def read_headers(tar: Path, flag: str) -> Contents:
    """Read the header of each member: 4 s for 100,000.

    Raises:
        UserError: it is compressed, truncated or damaged, or holds sparse files.
    """
    contents = Contents(tar, flag)
    try:
        with open_tar(tar) as file:
            end = -1
            while (member := file.next()) is not None:
                if member.size < 0 or file.offset <= end:
                    raise tarfile.ReadError(f"damaged after {end} bytes")
                end = file.offset
                file.members.clear()  # of a million members tarfile would hold a gigabyte
                add_member(contents, member)
            file.fileobj.seek(file.offset)  # tarfile takes a damaged header for the end
            if file.fileobj.read(512) != bytes(512):
                raise tarfile.ReadError(f"truncated or damaged after {file.offset} bytes")
    except (tarfile.TarError, OSError, OverflowError) as error:
        if isinstance(error, OSError):
            check_descriptors(error)
        raise UserError(f"{flag} {tar}: cannot be read as an uncompressed .tar ({error})") from error
    resolve_hard_links(contents)
    return contents


def open_tar(tar: Path) -> tarfile.TarFile:
    """Open a regular file; a pipe would be waited for."""
    if not os.path.isfile(tar):
        raise tarfile.ReadError("is no file")
    return tarfile.open(tar, "r:")


def add_member(contents: Contents, member: tarfile.TarInfo) -> None:
    """Add a file or link; the last one of a name counts, as when the .tar is unpacked."""
    path = plain_path(member.name)
    for kind in (contents.members, contents.links, contents.hard_links):
        kind.pop(path, None)
    if member.issparse():
        fix = "pack it again without --sparse"
        raise UserError(f"{contents.flag} {contents.tar}: holds {path} as a sparse file; {fix}")
    if member.isreg():
        contents.members[path] = (member.name, member.offset_data, member.size)
    elif member.issym():
        contents.links[path] = member.linkname
    elif member.islnk():
        contents.hard_links[path] = plain_path(member.linkname)
    elif member.isdev() and is_image(path):
        raise UserError(f"{contents.flag} {contents.tar}: holds {path} as a device or pipe; pack it again without it")


def resolve_hard_links(contents: Contents) -> None:
    """Turn each hard link into a second name of the file, or of the symbolic link, that it means."""
    for path in contents.hard_links:
        target = path
        for _ in range(MOST_LINKS_IN_A_ROW):
            target = contents.hard_links.get(target, target)
        if target in contents.members:
            contents.members[path] = (path, *contents.members[target][1:])
        elif target in contents.links:
            contents.links[path] = contents.links[target]
        else:
            raise contents.error(path, f"leads to {target}, which is not in it")


def plain_path(name: str) -> str:
    """Return the path of a member without "./" and "/" in front."""
    if name.startswith(("./", "/")) or "//" in name or "/./" in name or name.endswith("/"):
        return "/".join(part for part in name.split("/") if part not in ("", "."))
    return name
