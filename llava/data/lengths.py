"""Lengths of samples without decoding their media."""


def record_lengths(records, family, loaded, args):
    """(tokens, patches, exact) of each record's sample."""
    from PIL import Image

    from llava.data.paths import resolve_path, shown_media
    from llava.errors import LlavaError

    found = []
    for index in range(len(records)):
        own, record = args.within(records.part(index)), records[index]
        kind, names = shown_media(record, own.add_time_instruction)
        sizes = []
        try:
            if kind != "video":
                for name in names:
                    with Image.open(resolve_path(own.image_folder, name, own.allow_absolute_paths)) as picture:
                        sizes.append(picture.size)
            found.append(family.length(record, sizes, loaded, own))
        except (OSError, LlavaError):
            found.append((0, 0, True))
    return tuple(zip(*found, strict=True))
