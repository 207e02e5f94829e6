"""Videos with captions."""

from __future__ import annotations

from functools import partial
from typing import Literal

from pipelines import storage
from pipelines.corpora.cells import VIDEO_SUFFIXES, awaited, caption_of, first_of, some_text
from pipelines.manifest import Shard, ShardIndex
from pipelines.reading import LIMITS, Draft, Opener, Read, folder_of, string
from pipelines.rows import Row, read_rows, scan_rows, suffix
from pipelines.tars import Files, read_tar, scan_tar
from pipelines.types import Chunk, Frames, Limits, Reason, SkipSample, Text, Video, spec


@spec
class Videos:
    """Clips with captions: jsonl with `video` and `caption` or `text`, or webdataset tars of `key.mp4` and `key.txt`.

    `video` is a file below `videos` (by default the list's own folder), or a folder of frames: a path that ends in `/` or has
    no suffix. Frames are shown in the order of the numbers in their names.
    """

    kind: Literal["videos"] = "videos"
    name: str
    videos: str = ""
    frames: Frames = Frames()

    def files(self, uri: str) -> tuple[str, ...]:
        return (uri,)

    def scan(self, uri: str, opener: Opener = storage.open_file) -> ShardIndex:
        if suffix(uri) == "tar":
            return scan_tar(uri, opener, self._in_tar)
        return scan_rows(uri, opener, partial(self._in_list, folder_of(uri, self.videos))).index()

    def read(self, shard: Shard, chunk: Chunk, limits: Limits = LIMITS) -> Read:
        """Documents of rows `[chunk.start, chunk.stop)`, in order."""
        if suffix(shard.uri) == "tar":
            return read_tar(self.name, shard, chunk, limits, self._in_tar)
        return read_rows(self.name, shard, chunk, limits, partial(self._in_list, folder_of(shard.uri, self.videos)))

    def _in_tar(self, files: Files) -> Draft:
        data = next((files[ending] for ending in VIDEO_SUFFIXES if ending in files), None)
        if data is None:
            raise SkipSample(Reason.MISSING_IMAGE, f"no video; the row holds {sorted(files)}")
        return Draft(segments=(Video(data=data, frames=self.frames), Text(text="\n" + caption_of(files))))

    def _in_list(self, folder: str, row: Row) -> Draft:
        video = awaited(folder, string(row, "video"), frames=self.frames)
        return Draft(segments=(video, Text(text="\n" + some_text(first_of(row, "caption", "text")))))
