"""Data sets as they are published, small: the same files, keys and nesting."""

import io
import json
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image


def picture(number: int, kind: str = "JPEG", size: tuple[int, int] = (16, 12)) -> bytes:
    """An image file whose bytes depend on its number."""
    file = io.BytesIO()
    Image.new("RGB", size, (number * 37 % 256, number * 11 % 256, 90)).save(file, kind)
    return file.getvalue()


def put(path: Path, data: bytes | str | Any) -> Path:
    """Write bytes, text, or JSON, and the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(data, (bytes, str)):
        data = json.dumps(data, ensure_ascii=False)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def put_lines(path: Path, entries: Iterable[Any]) -> Path:
    return put(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


def put_images(folder: Path, names: Iterable[str]) -> None:
    for number, name in enumerate(names):
        put(folder / name, picture(number))


def put_zip(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def put_tar(path: Path, members: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def put_parquet(path: Path, rows: list[dict], group: int = 4) -> Path:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def said(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def llava(number: int, image: str | None = None, **keys: Any) -> dict:
    """A row of LLaVA-Instruct-150K, LLaVA-CC3M-Pretrain-595K, Chinese_Llava_Data, …"""
    turns = said("<image>\n图里有什么？", f"第 {number} 个物体。")
    return {
        "id": f"{number:09}",
        "image": image or f"{number:012}.jpg",
        "conversations": turns,
    } | keys


# Each writes a data set of six records into a folder, of which one or more cannot be used.


def llava_folder(folder: Path) -> None:
    put_images(folder / "images", [f"{n:012}.jpg" for n in range(5)])
    put(folder / "images" / "000000000004.jpg", picture(4)[:200])
    put(folder / "llava_instruct.json", [llava(n) for n in range(6)])
    put(folder / "README.md", "# data")


def cc3m_zip(folder: Path) -> None:
    rows = [llava(n, f"GCC_train_{n:09}.jpg") for n in range(6)]
    put(folder / "chat.json", rows)
    about = {"caption": "a cat", "blip_caption": "cat", "url": "http://x/y"}
    put(folder / "metadata.json", [{"id": r["id"], "image": r["image"], **about} for r in rows])
    put_zip(folder / "images.zip", {row["image"]: picture(n) for n, row in enumerate(rows[:5])})


def allava(folder: Path) -> None:
    rows = [llava(n, f"allava_laion/images/{n}.jpeg", url="http://x") for n in range(6)]
    put(folder / "allava_laion" / "ALLaVA-Caption-LAION-4V_Chinese.json", rows)
    chunks = folder / "allava_laion" / "image_chunks"
    put_zip(chunks / "images_0.zip", {rows[n]["image"]: picture(n) for n in range(3)})
    put_zip(chunks / "images_1.zip", {rows[n]["image"]: picture(n) for n in range(3, 5)})


def svlm_data(folder: Path) -> None:
    """SVLM's, and minimind-v's of 2024: several images are one text."""
    turns = [{"role": "user", "content": "<image>\n描述"}, {"role": "assistant", "content": "猫"}]
    two = [{"role": "user", "content": "<image><image>\n比较"}, turns[1]]
    rows: list[dict] = [{"conversations": turns, "image": f"{n}.jpg"} for n in range(5)]
    rows.append({"conversations": two, "image": "0.jpg, 1.jpg"})
    put_lines(folder / "pretrain_vlm_data.jsonl", rows)
    put_images(folder / "pretrain_images", [f"{n}.jpg" for n in range(4)])


def chinese_llava(folder: Path) -> None:
    """LinkSoul's: originals and translations in their own folders, images beside them."""
    put(folder / "LLaVA-Instruct-150K" / "translated" / "llava_instruct_80k.json",
        [llava(n) for n in range(6)])  # fmt: skip
    put_images(folder / "train2014", [f"COCO_train2014_{n:012}.jpg" for n in range(5)])


def the_cauldron(folder: Path) -> None:
    turns = [{"user": "What is it?", "assistant": "A bus.", "source": "VQAv2"},
             {"user": "Its colour?", "assistant": "Red.", "source": "VQAv2"}]  # fmt: skip
    rows = [{"images": [{"bytes": picture(n), "path": None}], "texts": turns} for n in range(5)]
    rows.append({"images": [{"bytes": b"\xff\xd8\xff broken", "path": None}], "texts": turns})
    put_parquet(folder / "vqav2" / "train-00000-of-00001-ab.parquet", rows)


def fine_vision(folder: Path) -> None:
    rows = [
        {"images": [{"bytes": picture(n, "PNG"), "path": f"{n}.png"}] * (1 + n % 2),
         "texts": [{"user": "Describe.", "assistant": f"{n} shapes."}], "source": "x",
         "relevance_ratings": [5], "relevance_min": 5, "images_count": 1}
        for n in range(6)
    ]  # fmt: skip
    rows[5]["texts"] = [{"user": "Describe.", "assistant": ""}]
    put_parquet(folder / "train-00000-of-00001.parquet", rows)


def minimind(folder: Path) -> None:
    def row(question: str, image: bytes) -> dict:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "好的。"}]
        return {"conversations": json.dumps(turns, indent=1), "image_bytes": image}

    rows = [row("<image>\n请描述图片。", picture(n % 2)) for n in range(4)]
    rows.append(row("讲个笑话。", picture(0)))  # an image that no turn shows
    rows.append(row("你好", _black()))
    put_parquet(folder / "sft_i2t.parquet", rows)


def _black() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    return file.getvalue()


def rlhf_v(folder: Path) -> None:
    def pair(chosen: str) -> str:
        return json.dumps({"question": "What is it?", "chosen": chosen, "rejected": "A cat."})

    rows = [
        {"ds_name": "RLHF-V", "image": {"bytes": picture(n), "path": "llava1.5/000.jpg"},
         "text": pair(f"A dog {n}."), "origin_dataset": "VQAv2", "origin_split": "{}", "idx": n,
         "image_path": f"./x/{n}.jpg"}
        for n in range(6)
    ]  # fmt: skip
    rows[5]["text"] = pair("A cat.")
    put_parquet(folder / "RLHF-V-Dataset.parquet", rows)


def rlaif_v(folder: Path) -> None:
    rows = [
        {"ds_name": "RLAIF-V", "image": {"bytes": picture(n), "path": "a.jpg"},
         "question": "Where?",
         "chosen": "Here.", "rejected": "There.", "idx": str(n), "image_path": f"./x/{n}.jpg"}
        for n in range(6)
    ]  # fmt: skip
    rows[2]["chosen"] = ""
    put_parquet(folder / "RLAIF-V-Dataset_000.parquet", rows)


def ai_challenger(folder: Path) -> None:
    images = folder / "ai_challenger_caption_train_20170902"
    names = [f"8f00f3d0f1008e085ab660e70dffced16a8259f{n}.jpg" for n in range(3)]
    put_images(images / "caption_train_images_20170902", names[:2])
    put(images / "caption_train_annotations_20170902.json",
        [{"url": "http://b/x", "image_id": name, "caption": ["两个男人在跑步。", "有人在路上。"]}
         for name in names])  # fmt: skip


def coco(folder: Path) -> None:
    images = [
        {"id": 100 + n, "file_name": f"{n:012}.jpg", "height": 1, "width": 1} for n in range(5)
    ]
    notes = [{"id": n, "image_id": 100 + n, "caption": "A man riding a bike ."} for n in range(6)]
    info = {"info": {"year": 2017}, "images": images, "licenses": [{"id": 1}]}
    put(folder / "annotations" / "captions_train2017.json", {**info, "annotations": notes})
    put(folder / "annotations" / "captions_val2017.json", {**info, "annotations": notes})
    boxes = [{"id": 1, "image_id": 100, "bbox": [0, 0, 1, 1], "category_id": 1}]
    put(folder / "annotations" / "instances_train2017.json", {**info, "annotations": boxes})
    put_images(folder / "train2017", [image["file_name"] for image in images])


def karpathy(folder: Path) -> None:
    def image(number: int, split: str) -> dict:
        raw = ["A dog runs .", "a brown dog"]
        return {
            "filepath": "val2014",
            "sentids": [2 * number, 2 * number + 1],
            "filename": f"COCO_val2014_{number:012}.jpg",
            "imgid": number,
            "split": split,
            "sentences": [{"tokens": text.split(), "raw": text, "imgid": number} for text in raw],
            "cocoid": number,
        }

    splits = ("val", "train", "restval", "train", "test", "train")
    images = [image(number, split) for number, split in enumerate(splits)]
    put(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})
    put_images(folder / "val2014", [image["filename"] for image in images[:5]])


def flickr8k_cn(folder: Path) -> None:
    names = [f"{n}_ab12.jpg" for n in range(4)]
    put(folder / "flickr8kzhc.caption.txt",
        "".join(f"{name}#zhc#{k} 一只狗在跑。\n" for name in names for k in range(2)))  # fmt: skip
    put(folder / "train.txt", "".join(f"{name}\n" for name in names[:3]))
    put(folder / "test.txt", f"{names[3]}\n")
    put_tar(
        folder / "images.tar", {f"images/{name}": picture(n) for n, name in enumerate(names[:2])}
    )


def flickr8k_csv(folder: Path) -> None:
    rows = [f'{n}_x.jpg,"A child , in pink , is climbing ."\r\n' for n in range(6)]
    put(folder / "captions.txt", "image,caption\r\n" + "".join(rows))
    put_images(folder / "Images", [f"{n}_x.jpg" for n in range(5)])


def coco_cn(folder: Path) -> None:
    ids = [f"COCO_train2014_{n:012}" for n in range(6)]
    put(folder / "imageid.human-written-caption.txt", "".join(f"{i}#0\t一个男人。\n" for i in ids))
    put(folder / "imageid.human-written-caption.bosonseg.txt",
        "".join(f"{i}#0\t一:m 个:q 男人:n\n" for i in ids))  # fmt: skip
    put(folder / "imageid.human-written-tags.txt", "".join(f"{i} 男人 街道\n" for i in ids))
    put(folder / "coco-cn_train.txt", "".join(f"{i}\n" for i in ids))
    put_images(folder / "train2014", [f"{i}.jpg" for i in ids[:5]])


def basic_vlm(folder: Path) -> None:
    names = [f"{n:012}.jpg" for n in range(6)]
    image_map = {
        n: {"image_file": n, "ID": k, "path": "/home/u/train2017/"} for k, n in enumerate(names)
    }
    questions = {
        str(k): {"q": "<|extra_0|>这幅图像中有什么？", "a": ["两只猫。"]} for k in range(6)
    }
    questions["1"]["a"] = "一只狗。"
    questions["2"]["a"] = {"from": "gpt", "value": "一辆车。"}
    questions["4"]["a"] = {"from": "human", "value": "<image>\n描述图片"}
    put(folder / "image_map.json", image_map)
    put(folder / "captions.json", questions)
    put_images(folder / "train2017", names[:5])


def llama_factory(folder: Path) -> None:
    turns = [
        {"role": "user", "content": "<image>What?"},
        {"role": "assistant", "content": "A cat."},
    ]
    put(folder / "mllm_demo.json",
        [{"messages": turns, "images": [f"mllm_demo_data/{n}.jpg"]} for n in range(4)])  # fmt: skip
    put(folder / "alpaca_zh.json", [{"instruction": "翻译", "input": "cat", "output": "猫"},
                                    {"instruction": "空", "input": "", "output": ""}])  # fmt: skip
    put(folder / "dpo.json", [{"conversations": said("Hi", "x")[:1],
                               "chosen": {"from": "gpt", "value": "Hello."},
                               "rejected": {"from": "gpt", "value": "Go."}}])  # fmt: skip
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
    }
    put(folder / "dataset_info.json", {
        "mllm_demo": {"file_name": "mllm_demo.json", "formatting": "sharegpt",
                      "columns": {"messages": "messages", "images": "images"}, "tags": tags},
        "alpaca_zh": {"file_name": "alpaca_zh.json"},
        "dpo": {"file_name": "dpo.json", "ranking": True, "formatting": "sharegpt",
                "columns": {"messages": "conversations", "chosen": "chosen",
                            "rejected": "rejected"}},
        "elsewhere": {"hf_hub_url": "llamafactory/x"},
    })  # fmt: skip
    put_images(folder / "mllm_demo_data", [f"{n}.jpg" for n in range(3)])


def ms_swift(folder: Path) -> None:
    put_lines(folder / "train.jsonl", [
        {"messages": [{"role": "user", "content": "<image>是什么"},
                      {"role": "assistant", "content": "猫"}], "images": ["0.jpg"]},
        {"query": "<image>是什么", "response": "狗", "images": ["1.jpg"]},
        {"query": "再说", "response": "好", "history": [["你好", "您好"]]},
        {"messages": [{"role": "system", "content": "s"},
                      {"role": "user", "content": "<image><image>"},
                      {"role": "assistant", "content": "两张"}], "images": ["0.jpg", "1.jpg"]},
        {"messages": [{"role": "user", "content": "<video>?"},
                      {"role": "assistant", "content": "x"}],
         "videos": ["a.mp4"]},
        {"messages": [{"role": "user", "content": "<image><image>"},
                      {"role": "assistant", "content": "x"}], "images": ["0.jpg"]},
    ])  # fmt: skip
    put_images(folder, ["0.jpg", "1.jpg"])


def ms_swift_dpo(folder: Path) -> None:
    turns = [{"role": "user", "content": "<image>是什么"}, {"role": "assistant", "content": "猫"}]
    put_lines(folder / "dpo.jsonl", [
        {"messages": turns, "rejected_response": f"狗{n}", "images": ["0.jpg"]} for n in range(5)
    ] + [{"messages": turns, "rejected_response": "猫", "images": ["0.jpg"]}])  # fmt: skip
    put_images(folder, ["0.jpg"])


def openai(folder: Path) -> None:
    import base64

    def turns(url: str) -> list[dict]:
        parts = [
            {"type": "text", "text": "What?"},
            {"type": "image_url", "image_url": {"url": url}},
        ]
        return [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]

    data = "data:image/png;base64," + base64.b64encode(picture(1, "PNG")).decode()
    urls = [data, "0.jpg", "https://example.com/a.jpg", "0.jpg", data, "0.jpg"]
    put_lines(folder / "openai.jsonl", [{"messages": turns(url)} for url in urls])
    put_images(folder, ["0.jpg"])


def share_gpt(folder: Path) -> None:
    turns = [
        {"from": "system", "value": "s"},
        *said("Hi", "Hello."),
        *said("<image> this?", "A cat."),
    ]
    rows: list[dict] = [{"id": "a", "conversations": turns, "image": "0.jpg"} for _ in range(4)]
    rows.append({"conversations": [{"from": "human", "value": "Hi"}]})
    rows.append({"conversations": [*said("Hi", "x"), {"from": "tool", "value": "y"}]})
    put(folder / "sharegpt.json", rows)
    put_images(folder, ["0.jpg"])


def csv(folder: Path) -> None:
    rows = [f'img/{n}.png,"What ""is"" it,\nhere?",A thing; {n}\n' for n in range(5)]
    put(
        folder / "vqa.csv",
        "\ufeffimage_path,question,answer\n" + "".join(rows) + "img/0.png,too,many,cells\n",
    )
    for n in range(5):
        put(folder / "img" / f"{n}.png", picture(n, "PNG"))


def tsv(folder: Path) -> None:
    put(folder / "captions.tsv", "图片\t描述\n" + "".join(f"{n}.jpg\t一只猫。\n" for n in range(6)))
    put_images(folder, [f"{n}.jpg" for n in range(5)])


def folder_of_texts(folder: Path) -> None:
    put_images(folder, [f"a/{n}.jpg" for n in range(5)])
    for n in range(3):
        put(folder / "a" / f"{n}.txt", "a cat , sleeping .\n")
    put(folder / "a" / "3.json", said("<image>\nWhat?", "A dog."))
    put(folder / "a" / "5.txt", "text alone")


def webdataset(folder: Path) -> None:
    members: dict[str, bytes | str] = {"__key__": ""}
    for n in range(6):
        members |= {f"{n:05}.jpg": picture(n), f"{n:05}.txt": f"一张图 {n}"}
    members["00005.jpg"] = b"no image"
    put_tar(folder / "00000.tar", members)
