"""Downloads read the same unpacked or not, and nothing in them reaches outside."""

import io
import tarfile
import zipfile

import pytest

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.builders import downloads
from fedhelp_jax.data.builders.downloads import Download, check_present, check_unique

FILES = {"Set/images/a.png": b"A", "Set/images/b.png": b"B" * 1000, "Set/table.csv": b"id\na\n"}
LITTER = {"__MACOSX/Set/images/._a.png": b"x", "Set/.DS_Store": b"x", "Set/images/._b.png": b"x"}


def write_folder(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def write_zip(folder, files):
    with zipfile.ZipFile(folder / "download.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def write_tar(folder, files, mode="w", name="download.tar"):
    with tarfile.open(folder / name, mode) as archive:
        for member, data in files.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_tar_gz(folder, files):
    write_tar(folder, files, "w:gz", "download.tar.gz")


def write_mixed(folder, files):
    """One file unpacked, the others in an archive in a folder of its own."""
    name, *rest = files
    write_folder(folder, {name: files[name]})
    write_zip(folder, {other: files[other] for other in rest})


WAYS = [write_folder, write_zip, write_tar, write_tar_gz, write_mixed]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "download").mkdir()
    return tmp_path / "download"


def opened(folder, **options):
    return Download(folder, folder.parent / "scratch", **options)


@pytest.mark.parametrize("write", WAYS)
def test_a_download_reads_the_same_unpacked_or_not(folder, write):
    write(folder, FILES | LITTER)
    with opened(folder) as download:
        found = {name: download.read(name) for name in download.names}
        assert {k: v for k, v in found.items() if not k.startswith("download.")} == FILES
        assert download.by_stem((".png",), "images") == {
            "a": "Set/images/a.png",
            "b": "Set/images/b.png",
        }
        assert download.by_stem((".png",), "Set") == {}
        assert download.table(["table.csv"], ["id"]) == ("Set/table.csv", [{"id": "a"}])


def test_what_an_archive_holds_stands_beside_it_and_comes_after_what_is_unpacked(folder):
    (folder / "part").mkdir()
    write_zip(folder / "part", {"images/a.png": b"packed", "images/b.png": b"packed"})
    write_folder(folder / "part", {"images/a.png": b"unpacked"})
    with opened(folder) as download:
        assert download.read("part/images/a.png") == b"unpacked"
        assert download.read("part/images/b.png") == b"packed"


def test_a_compressed_tar_archive_is_unpacked_once(folder):
    write_tar_gz(folder, FILES)
    said: list[str] = []
    for _ in range(2):
        with opened(folder, say=said.append) as download:
            assert download.read("Set/images/a.png") == b"A"
    assert said == ["unpacking download.tar.gz"]
    write_tar_gz(folder, {"Set/images/a.png": b"another"})  # another archive of that name
    with opened(folder, say=said.append) as download:
        assert download.read("Set/images/a.png") == b"another"
        assert "Set/images/b.png" not in set(download.names)


@pytest.mark.parametrize("write", [write_zip, write_tar, write_tar_gz])
@pytest.mark.parametrize("name", ["../out.png", "/out.png", "a/../../out.png", "C:\\out.png"])
def test_names_outside_of_the_folder_are_refused(folder, write, name):
    write(folder, {"a.png": b"A", name: b"x"})
    with pytest.raises(UserError, match="outside of its folder"):
        opened(folder)
    outside = {path.name for path in folder.parent.rglob("*")}
    assert "out.png" not in outside and "a.png" not in outside


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_links_and_devices_are_refused(folder, kind, mode):
    with tarfile.open(folder / f"x.tar{mode[1:].replace(':', '.')}", mode) as archive:
        info = tarfile.TarInfo("link.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(UserError, match="link or no plain file"):
        opened(folder)


@pytest.mark.parametrize("write", [write_zip, write_tar_gz])
def test_bombs_are_refused(folder, write, monkeypatch):
    """What unpacks to absurdly much; 20 MB of zeros stand for it."""
    monkeypatch.setattr(downloads, "_BOMB_BYTES", 10**7)
    write(folder, {"a.png": bytes(2 * 10**7)})
    with pytest.raises(UserError, match="would unpack to"):
        opened(folder)
    assert not list(folder.parent.rglob("a.png"))


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
def test_damaged_archives_are_one_line(folder, name):
    (folder / name).write_bytes(b"no archive at all")
    with pytest.raises(UserError, match="damaged or no such archive"):
        opened(folder)


def test_a_truncated_compressed_tar_leaves_nothing_behind(folder):
    write_tar_gz(folder, {"a.png": bytes(range(256)) * 100, "b.png": b"B"})
    path = folder / "download.tar.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="damaged or no such archive"):
        opened(folder)
    assert list((folder.parent / "scratch").iterdir()) == []


def test_a_zip_damaged_in_the_middle_is_found_when_read(folder):
    write_zip(folder, {"a.png": bytes(range(256)) * 100})
    path = folder / "download.zip"
    data = bytearray(path.read_bytes())
    data[60:70] = bytes(10)
    path.write_bytes(data)
    with opened(folder) as download, pytest.raises(UserError, match="a.png in .* cannot be read"):
        download.read("a.png")


def test_the_same_name_twice_in_an_archive_is_refused(folder):
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        archive.writestr("a.png", b"1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.png", b"2")
    with pytest.raises(UserError, match=r"holds a.png twice"):
        opened(folder)


def test_missing_and_empty_folders(folder):
    with pytest.raises(UserError, match="is empty"):
        opened(folder)
    with pytest.raises(UserError, match="no such folder"):
        opened(folder / "x")


def test_links_in_a_circle_end(folder):
    write_folder(folder, FILES)
    (folder / "Set" / "again").symlink_to(folder)
    with opened(folder) as download:
        assert sorted(download.names) == sorted(FILES)


def test_two_files_of_one_stem(folder):
    write_folder(folder, {"x/images/a.png": b"", "y/images/a.png": b""})
    with opened(folder) as download, pytest.raises(UserError, match="are both called a"):
        download.by_stem((".png",), "images")


def test_tables(folder):
    write_folder(folder, {"a.csv": "\ufeffid, name\n 1 , x\n".encode(), "b.csv": b"id\n"})
    write_folder(folder, {"c.csv": b"\xff\xfe", "x/d.csv": b"", "y/d.csv": b""})
    with opened(folder) as download:
        assert download.table(["a.csv"], ["key|id", "name"])[1] == [
            {"id": "1", "name": "x", "key": "1"}
        ]
        for names, columns, words in [
            (["z.csv", "z"], [], "needs a file z.csv or z, has none"),
            (["d.csv"], [], "has more than one, x/d.csv and y/d.csv"),
            (["a.csv"], ["age|years"], "has no column age or years; it has id, name"),
            (["b.csv"], ["id"], "has no rows"),
            (["c.csv"], ["id"], "cannot be read as a CSV file"),
        ]:
            with pytest.raises(UserError, match=words):
                download.table(names, columns)


def test_what_is_missing_and_what_is_there_twice(tmp_path):
    with pytest.raises(UserError, match="4 of 5 images are missing: b, c, d, ..."):
        check_present({"a": "a.png"}, list("abcde"), "image", tmp_path)
    check_present({"a": "a.png"}, ["a"], "image", tmp_path)
    with pytest.raises(UserError, match="t.csv has image b 2 times"):
        check_unique("abbc", "image", "t.csv")
    check_unique("abc", "image", "t.csv")


def test_pictures_of_other_endings_are_said(folder):
    write_folder(folder, {f"images/{name}": b"-" for name in ("a.PNG", "b.tif", "c.jpg", "d.txt")})
    said = []
    with opened(folder, say=said.append) as download:
        assert list(download.by_stem((".png",), "images")) == ["a"]
    line = "2 pictures that do not end in .png are not read: images/b.tif, images/c.jpg"
    assert said[-1] == line
