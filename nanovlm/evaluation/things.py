"""Things on photos, which captions in Chinese and English mention, hint at or leave out.

People's captions of a photo tell which of them a model's caption names in error (CHAIR, Rohrbach et
al. 2018, with the few THINGS here for its 80 classes of COCO).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Thing:
    """Something that a yes/no question asks for, with its name in both languages.

    The regular expressions `zh` and `en` (whole words) match a mention of it. `hint` matches, in
    either language, what leaves it possible, such as a rider for a bicycle. Hints keep the answer
    "no" correct, because people do not mention what is obvious.
    """

    zh_name: str
    en_name: str
    zh: str
    en: str
    hint: str

    def answer(self, zh_captions: list[str], en_captions: list[str]) -> bool | None:
        """True if both languages mention it, False if neither mentions or hints at it, or None."""
        zh_text, en_text = "\n".join(zh_captions), "\n".join(en_captions)
        if self.is_in(zh_text) and self.is_in(en_text):
            return True
        return None if self.may_be_in(zh_text) or self.may_be_in(en_text) else False

    def is_in(self, text: str) -> bool:
        """Whether a text in either language mentions it."""
        return bool(re.search(self.zh, text) or re.search(rf"\b(?:{self.en})\b", text.lower()))

    def may_be_in(self, text: str) -> bool:
        """Whether a text in either language mentions it or leaves it possible."""
        return self.is_in(text) or bool(re.search(self.hint, text.lower()))


# Words for a man, a woman or a child alike. Names of trades end in -ist, and many in -er.
SOMEBODY = (
    r"(?<![男女])人(?!行)|员|手(?=在|骑|。)|者|朋友|夫妇|夫妻|情侣|队|们|众|家|学生"
    r"|\b(?:people|persons?|some(?:one|body)|couples?|crowds?|groups?|teams?|famil(?:y|ies)"
    r"|friends?|adults?|teen\w*|youths?|students?|fans?|kids|parents?|others|bands?"
    r"|\w+(?:ist|[bdgkltvy]er|[mn]ner|acer|urfer|oxer|icer|cher)s?)\b"
)
RIDING = r"车|骑|轮|cycl|wheel|vehicle|motor|scooter|bik|\b(?:rid|rac)"
WATER = (
    "水|海|河|湖|池|浪|船|泳|泉|雨|泥|water|sea|ocean|river|lake|pool|pond|wave|surf|swim|boat|stream|creek"
    "|wet|fish"
)
LAND = (
    "草|地|园|田|野|林|山|场|院|球|field|yard|park|garden|meadow|hill|outside|outdoor|green|ball|path|tree"
    "|forest|wood"
)

THINGS = (
    Thing(
        "狗",
        "a dog",
        zh="狗|犬",
        en="dogs?|pupp(?:y|ies)",
        hint="动物|宠物|animal|hound|retriever|terrier|poodle|leash",
    ),
    Thing(
        "男人",
        "a man",
        zh="男人|男子|男士",
        en="man|men|guys?",
        hint=rf"男|叔|爷|父|爸|老头|{SOMEBODY}|\b(?:males?|boys?|he|his)\b",
    ),
    Thing(
        "女人",
        "a woman",
        zh="女人|女子|女士",
        en="wom[ae]n|lady|ladies",
        hint=rf"女|妇|妈|母|{SOMEBODY}|female|\b(?:girls?|she|her)\b",
    ),
    Thing(
        "孩子",
        "a child",
        zh="孩|儿童|小朋友|宝宝|婴儿",
        en="child(?:ren)?|kids?|boys?|girls?|toddlers?|baby",
        hint=rf"童|少年|{SOMEBODY}|young",
    ),
    Thing("自行车", "a bicycle", zh="自行车|单车|山地车", en="bikes?|bicycles?", hint=RIDING),
    Thing(
        "摩托车",
        "a motorcycle",
        zh="摩托",
        en="motorcycles?|motorbikes?|dirt ?bikes?|bikes?",
        hint=RIDING,
    ),
    Thing(
        "汽车",
        "a car",
        zh="汽车|轿车|赛车(?!手)|出租车",
        en="cars?|trucks?|taxi|suv|jeep",
        hint=rf"{RIDING}|路|街|road|street|parking|city",
    ),
    Thing(
        "滑板",
        "a skateboard",
        zh="滑板",
        en="skateboard(?:s|ers?|ing)?",
        hint="滑|板|skat|board|ramp",
    ),
    Thing(
        "雪",
        "snow",
        zh="雪(?!糕)",
        en="snow(?:y|s)?|snowboard(?:ers?|ing)?|ski(?:s|ers?|ing)?",
        hint="冰|冬|snow|ski|ice|icy|winter|sled",
    ),
    Thing(
        "海滩",
        "a beach",
        zh="海滩|沙滩|海边",
        en="beach(?:es)?|shore|seaside",
        hint=f"{WATER}|沙|滩|岸|sand|shore|coast|dune",
    ),
    Thing(
        "水",
        "water",
        zh="水(?!果|杯|瓶)|海|河|湖",
        en="water|ocean|sea|river|lake|pool|pond|waves?",
        hint=f"{WATER}|沙滩|岸|beach|shore",
    ),
    Thing("草地", "grass", zh="草", en="grass|grassy|lawn", hint=LAND),
    Thing(
        "球",
        "a ball",
        zh="(?<![气雪冰])球(?![员服拍场衣队])",
        en=r"\w*balls?",
        hint="球|赛|运动|soccer|tennis|game|sport|toy|play(?:er|s)",
    ),
    Thing(
        "马",
        "a horse",
        zh="(?<!木)马(?![路桶甲拉戏尾])",
        en="horses?|pony|ponies|bronco",
        hint="牛|骑|rodeo|rid(?:e|ing)|saddle|cart|carriage|animal",
    ),
    Thing(
        "山",
        "a mountain",
        zh="山(?![地车羊洞])",
        en="mountains?|mountainside|hills?|cliffs?",
        hint="岩|崖|坡|峰|石|雪|hill|cliff|rock|peak|slope|climb|hik|snow|canyon",
    ),
    Thing(
        "船",
        "a boat",
        zh="船|艇|皮筏|独木舟",
        en="boats?|kayaks?|canoes?|rafts?|sailboat|ship",
        hint=WATER,
    ),
    Thing(
        "鸟",
        "a bird",
        zh="鸟|鸽|海鸥|鹅|鸭|鹰",
        en="birds?|pigeons?|seagulls?|geese|goose|ducks?|swans?|eagle",
        hint="动物|飞|animal|fly|wing",
    ),
)


def things_named(caption: str, references: Sequence[str]) -> tuple[list[Thing], list[Thing]]:
    """The THINGS that a caption mentions, and those that no reference mentions or hints at."""
    text = "\n".join(references)
    named = [thing for thing in THINGS if thing.is_in(caption)]
    return named, [thing for thing in named if not thing.may_be_in(text)]
