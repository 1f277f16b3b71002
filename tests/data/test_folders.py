"""Files in folders and .tar files that are not data: hidden files, other kinds, lost classes; links, pipes."""

import io
import os
import pickle
import resource
import subprocess
import sys
import tarfile
import unicodedata

import pytest

from shared.calls import one_line
from shared.images import encode, plain, write_plain
from util.data.datasets import open_images
from util.data.decode import load_image
from util.data.sources import MOST_BYTES, MOST_OPEN_TARS, BadImage, FileSource, TarSource
from util.data.tars import read_headers
from util.runtime.errors import UserError
from util.runtime.files import ROOT
from util.runtime.logs import warn_once

CLASSES = ["train/cat/1.png", "train/cat/2.png", "train/dog/3.png"]
HIDDEN = [
    *(
        "train/cat/._1.png",
        "train/.ipynb_checkpoints/1-checkpoint.png",
        "train/@eaDir/1.png",
        "__MACOSX/cat/._1.png",
    ),
    *("train/cat/Thumbs.db", "train/.Trash-1000/files/9.png", "train/dog/@eaDir/3.png/SYNOPHOTO_THUMB_M.png"),
    *("train/$RECYCLE.BIN/9.png", "train/lost+found/9.png", ".git/objects/9.png"),
]


@pytest.fixture(autouse=True)
def _each_test_is_warned_anew():
    warn_once.cache_clear()


def refused(path):
    with pytest.raises(UserError) as error:
        open_images(str(path), "", "train")
    return one_line(error)


def short_names(source):
    return sorted("/".join(source.name(i).replace(":", "/").split("/")[-2:]) for i in range(len(source)))


# ---- hidden files and other kinds ---------------------------------------------------------------------------


@pytest.mark.parametrize("tar", [False, True])
def test_hidden_and_system_files_are_no_data_and_are_counted_in_one_line(tmp_path, capsys, tar):
    path = write_plain(tmp_path / ("x.tar" if tar else "x"), [*CLASSES, *HIDDEN, "train/cat/notes.txt", "train/a.npy"])
    for _ in range(2):
        source = open_images(str(path), "", "train")
    assert source.class_names == ["cat", "dog"]
    assert short_names(source) == ["cat/1.png", "cat/2.png", "dog/3.png"]
    (line,) = capsys.readouterr().err.splitlines()
    hidden = 10 if tar else 8  # what lies beside train/ in a folder is not listed
    assert f"{hidden} hidden or system files and folders (" in line
    assert line.endswith(" and 2 files of other kinds (.txt 1, .npy 1) are passed over") or ".npy 1, .txt 1" in line


@pytest.mark.parametrize("tar", [False, True])
@pytest.mark.parametrize("lost", ["3.heic", "._3.png", "3.npy"])
def test_a_class_that_loses_all_its_images_is_an_error(tmp_path, tar, lost):
    path = write_plain(tmp_path / ("x.tar" if tar else "x"), ["train/cat/1.png", f"train/dog/{lost}"])
    folder = "train/dog" if tar else "dog"
    assert f"its folder {folder} holds no image that is read, only {os.path.splitext(lost)[1]} 1" in refused(path)


def test_folders_of_documents_are_no_classes(tmp_path, capsys):
    path = write_plain(tmp_path / "x", ["cat/1.png", "dog/2.png", "meta/a.xml", "meta/b.json", "meta/deep/c.bin"])
    assert open_images(str(path), "", "train").class_names == ["cat", "dog"]
    assert "3 files of other kinds (" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".avif", ".jp2", ".j2k", ".apng", ".pnm", ".Jpeg"])
def test_every_ending_that_the_decoder_reads_is_read(tmp_path, suffix):
    from PIL import Image

    from util.data.formats import FORMATS

    kinds = {".avif": "AVIF", ".jp2": "JPEG2000", ".j2k": "JPEG2000", ".apng": "PNG", ".pnm": "PPM"}
    kind = kinds.get(suffix, "JPEG")
    if kind in ("AVIF", "JPEG2000") and kind not in FORMATS:
        pytest.skip("this Pillow does not read it")
    (tmp_path / f"x{suffix}").write_bytes(encode(Image.new("RGB", (9, 7), (200, 200, 200)), kind))
    pixels, _ = load_image(open_images(str(tmp_path), "", "train"), 0, 3, skip_bad=False)
    assert (pixels.int() - 200).abs().max() <= 2


@pytest.mark.parametrize("tar", [False, True])
def test_tiny_imagenet_s_layout(tmp_path, tar):
    names = [f"train/{kind}/images/{kind}_{n}.png" for kind in ("n01", "n02") for n in range(2)]
    path = write_plain(tmp_path / ("x.tar" if tar else "x"), [*names, "train/n01/n01_boxes.txt"])
    source = open_images(str(path), "", "train")
    assert (source.class_names, source.labels) == (["n01", "n02"], [0, 0, 1, 1])


# ---- links in .tar files ------------------------------------------------------------------------------------


def write_links(path, links, files=("train/cat/1.png", "train/dog/2.png")):
    """Write a .tar of images, then links: (name, "sym" or "hard", target)."""
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(files):
            member = tarfile.TarInfo(name)
            content = plain(number)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, kind, target in links:
            member = tarfile.TarInfo(name)
            member.type = tarfile.SYMTYPE if kind == "sym" else tarfile.LNKTYPE
            member.linkname = target
            tar.addfile(member)
    return path


LINKS = [
    ("train/fox/1.png", "hard", "train/cat/1.png"),
    ("train/fox/2.png", "hard", "train/fox/1.png"),
    ("train/bear/3.png", "sym", "../dog/2.png"),
    ("train/bear/4.png", "sym", "3.png"),
    ("train/wolf", "sym", "fox"),
    ("train/elk", "sym", "./wolf/../../train/dog"),
]


def test_links_are_read_as_the_same_folder_gives_them(tmp_path):
    tar = write_links(tmp_path / "x.tar", LINKS)
    with tarfile.open(tar) as file:
        file.extractall(tmp_path / "x", filter="fully_trusted")
    inside, folder = (open_images(str(path), "", "train") for path in (tar, tmp_path / "x"))
    assert short_names(inside) == short_names(folder)
    assert inside.class_names == folder.class_names == ["bear", "cat", "dog", "elk", "fox", "wolf"]
    content = {source.name(i).rpartition("train/")[2]: source.read(i) for source in (inside, folder) for i in range(9)}
    assert content["bear/4.png"] == content["elk/2.png"] == plain(1)
    assert content["wolf/2.png"] == content["cat/1.png"] == plain(0)


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        (("train/cat/x.png", "sym", "/etc/passwd"), "leads out of it"),
        (("train/cat/x.png", "sym", "../../../secret.png"), "leads out of it"),
        (("train/fox", "sym", "../../elsewhere"), "leads out of it"),
        (("train/cat/x.png", "hard", "/etc/passwd"), "leads to etc/passwd, which is not in it"),
        (("train/cat/x.png", "sym", "gone.png"), "leads to train/cat/gone.png, which is not in it"),
        (("train/cat/x.png", "sym", "x.png"), "leads in a circle"),
        (("train/cat/up", "sym", ".."), "a link leads back to a folder around it"),
    ],
)
def test_links_that_leave_the_tar_are_refused(tmp_path, link, reason):
    message = refused(write_links(tmp_path / "x.tar", [link]))
    assert f"its link {link[0]} " in message or "circle" in message or "around" in message
    assert reason in message


def test_links_to_folders_that_multiply_the_files_are_refused(tmp_path):
    links = [(f"{n}/{k}", "sym", f"../{n + 1}") for n in range(12) for k in range(10)]
    assert "links to folders multiply" in refused(write_links(tmp_path / "x.tar", links, ("12/1.png",)))


def test_the_last_of_equal_names_counts_as_when_it_is_unpacked(tmp_path):
    tar = write_links(tmp_path / "x.tar", [], ("a/1.png", "b/1.png", "./a/1.png"))
    source = open_images(str(tar), "", "train")
    assert [source.read(i) for i in range(len(source))] == [plain(2), plain(1)]


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_devices_and_pipes_in_a_tar_are_refused(tmp_path, kind):
    path = write_plain(tmp_path / "x.tar", ["cat/a.png"])
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("cat/b.png")
        member.type = kind
        tar.addfile(member)
    assert "holds cat/b.png as a device or pipe" in refused(path)


def test_folders_of_one_name_at_different_depths_are_one_class(tmp_path):
    path = write_plain(tmp_path / "x", ["cat/a.png", "more/cat/b.png"])
    assert open_images(str(path), "", "train").class_names == ["cat"]


def test_sparse_members_and_wrong_sizes_are_refused_before_they_are_read(tmp_path):
    with open(tmp_path / "hole.png", "wb") as file:
        file.truncate(2**20)
        file.seek(0)
        file.write(plain(0))
    command = ["tar", "--sparse", "-cf", str(tmp_path / "x.tar"), "-C", str(tmp_path), "hole.png"]
    subprocess.run(command, check=True)
    assert "holds hole.png as a sparse file; pack it again without --sparse" in refused(tmp_path / "x.tar")

    member = tarfile.TarInfo("a.png")
    member.size = 2**40
    with open(tmp_path / "y.tar", "wb") as file:  # a terabyte, as far as the file system says
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + 2**40 + 1024)
    with pytest.raises(UserError, match=f"has {2**40} bytes, at most {MOST_BYTES} are read"):
        load_image(open_images(str(tmp_path / "y.tar"), "", "train"), 0, 3, skip_bad=False)


# ---- files that are none ------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
def test_pipes_devices_and_folders_are_bad_images_and_nobody_waits_for_them(tmp_path):
    os.mkfifo(tmp_path / "1.png")
    (tmp_path / "2.png").symlink_to("/dev/zero")
    (tmp_path / "3.png").symlink_to(tmp_path / "absent")
    with open(tmp_path / "4.png", "wb") as file:
        file.truncate(2**40)
    (tmp_path / "5.png").write_bytes(plain(7))
    source = open_images(str(tmp_path), "", "train")
    reasons = ("is a pipe (FIFO), no file", "is a device, no file", "No such file", f"has {2**40} bytes, at most")
    for index, reason in enumerate(reasons):
        with pytest.raises(BadImage) as error:
            source.read(index)
        assert reason in str(error.value)
    assert load_image(source, 0, 3, skip_bad=True)[1] == 4
    with pytest.raises(BadImage, match="is a folder"):
        FileSource([str(tmp_path)], None, None).read(0)
    assert "is no file" in refused_tar(tmp_path)


def refused_tar(folder):
    os.mkfifo(folder / "x.tar")
    with pytest.raises(UserError) as error:
        read_headers(folder / "x.tar", "--data_path")
    return one_line(error)


# ---- descriptors --------------------------------------------------------------------------------------------


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_tar_files_are_closed_again(tmp_path):
    for n in range(3 * MOST_OPEN_TARS):
        write_plain(tmp_path / f"{n:04d}.tar", [f"{n}.png"])
    before = open_descriptors()
    source = open_images(str(tmp_path), "", "train")
    for _ in range(2):
        for index in range(len(source)):
            assert source.read(index)
    assert isinstance(source, TarSource)
    assert open_descriptors() <= before + MOST_OPEN_TARS


@pytest.fixture
def no_descriptors():
    """Let the process open no further file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    spare = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, hard))
    try:
        while True:
            try:
                spare.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in spare:
            os.close(descriptor)


@pytest.mark.parametrize("tar", [False, True])
def test_a_process_without_descriptors_blames_no_image(tmp_path, tar, request):
    path = write_plain(tmp_path / ("x.tar" if tar else "x"), ["a.png", "b.png"])
    source = pickle.loads(pickle.dumps(open_images(str(path), "", "train")))  # with no .tar open any more
    request.getfixturevalue("no_descriptors")
    for skip_bad in (False, True):
        with pytest.raises(OSError, match="Too many open files"):
            load_image(source, 0, 3, skip_bad)


SCRIPT = """
import os, resource, sys
sys.path.insert(0, {root!r})
from util.data.datasets import open_images
from util.data.labelled import LabelledDataset
from util.data.loader import Loader
from util.runtime.errors import run_main
def main():
    source = open_images({path!r}, "", "train")
    dataset = LabelledDataset(source, list(range(len(source))) * 2, (8, 8), 3)
    if {starve}:
        init = lambda: [os.dup(0) for _ in range(10_000)]
        class Starved(LabelledDataset):
            def __getitem__(self, place):
                try: init()
                except OSError: pass
                return super().__getitem__(place)
        dataset = Starved(source, range(len(source)), (8, 8), 3, skip_bad=True)
    print(sum(len(labels) for _, labels in Loader(dataset, batch_size=4, num_workers=1)))
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
run_main("x", main)
"""


@pytest.mark.parametrize("starve", [False, True])
def test_many_tars_with_few_descriptors_and_a_worker(tmp_path, starve):
    for n in range(300):
        write_plain(tmp_path / f"n{n:04d}.tar", [f"n{n}.png"])
    script = SCRIPT.format(root=str(ROOT), path=str(tmp_path), starve=starve)
    call = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    if starve:  # skipped images would be the wrong end
        assert call.returncode == 1
        assert call.stderr.splitlines()[-1].startswith("x: error: too many files are open: raise the limit (ulimit -n")
    else:
        assert (call.returncode, call.stdout) == (0, "600\n"), call.stderr


@pytest.mark.parametrize("tar", [False, True])
def test_class_names_that_macos_decomposed_are_those_of_linux(tmp_path, tar):
    names = [unicodedata.normalize(form, f"{split}/café/1.png") for form, split in (("NFD", "train"), ("NFC", "val"))]
    path = write_plain(tmp_path / ("x.tar" if tar else "x"), [*names, "train/dog/1.png", "val/dog/1.png"])
    train, val = (open_images(str(path), "", split) for split in ("train", "val"))
    assert train.class_names == val.class_names == [unicodedata.normalize("NFC", "café"), "dog"]


def test_a_pointer_of_git_lfs_is_called_so(tmp_path):
    (tmp_path / "1.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n")
    with pytest.raises(UserError, match="git lfs pull"):
        load_image(open_images(str(tmp_path), "", "train"), 0, 3, skip_bad=False)
