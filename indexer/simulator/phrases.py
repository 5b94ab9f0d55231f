"""Words for the simulated people: phrases by language, with scripts and emoji that tempt naive code."""

from __future__ import annotations

PHRASES: dict[str, tuple[str, ...]] = {
    "en": (
        "good morning everyone",
        "just finished a long walk by the river",
        "does anybody know a good book on tides?",
        "the bakery on the corner is open again",
        "shipping day, wish me luck",
        "I can't believe it's already autumn",
        "hot take: tabs and spaces can be friends",
        "the cat has opinions about my keyboard",
        "reading old letters tonight",
        "this thread is worth your time",
        "a small win: the tests are green",
        "coffee first, then the rest of the world",
    ),
    "de": (
        "Schöne Grüße aus Köln",
        "Das Wetter könnte besser sein",
        "Heute Äpfel gepflückt, morgen gibt's Kuchen",
        "Übermorgen geht's los",
    ),
    "fr": (
        "où est passé l'été ?",
        "un café crème, s'il vous plaît",
        "la mer est calme ce matin",
        "déjà vendredi, enfin",
    ),
    "pt": (
        "bom dia, São Paulo",
        "não acredito que choveu de novo",
        "coração tranquilo",
        "amanhã é outro dia",
    ),
    "ja": (
        "おはようございます",
        "今日はいい天気ですね",
        "猫がキーボードの上で寝ています",
        "新しい本を読み始めました",
        "電車が遅れている…",
    ),
    "zh": ("今天的月亮很圆", "早上好，世界", "周末去爬山了", "这本书值得一读"),
    "ko": ("좋은 아침이에요", "오늘도 힘내세요", "고양이가 창밖을 봐요"),
    "ar": ("صباح الخير يا أصدقاء", "القهوة جاهزة", "الطقس جميل اليوم"),
    "he": ("בוקר טוב לכולם", "היום יום יפה", "מי רוצה קפה?"),
    "ru": ("доброе утро", "осень пришла внезапно", "кто-нибудь читал эту книгу?"),
    "th": ("สวัสดีตอนเช้า", "วันนี้ฝนตก"),
}
EMOJI = ("🌊", "✨", "☕️", "🐈‍⬛", "👩‍💻", "🏳️‍🌈", "🇧🇷", "👍🏽", "🎉", "🌱", "👨‍👩‍👧‍👦", "❤️‍🔥", "1️⃣", "🫠")
TAGS = ("caturday", "art", "写真", "photography", "dev", "naturaleza", "музыка", "books", "späti", "atproto")
SITES = (
    ("https://example.com/articles/tide-tables", "Tide tables, explained", "How the moon moves the sea."),
    ("https://example.org/~ana/garden?year=2024&plot=3#beans", "The garden diary", ""),
    ("https://news.example.net/日本語/記事", "記事のタイトル", "短い説明文。"),
    ("https://example.com/", "Example Domain", "This domain is for use in illustrative examples."),
)
NAMES = (
    "ana",
    "bo",
    "carla",
    "dmitri",
    "emi",
    "farid",
    "grace",
    "hana",
    "ivo",
    "jun",
    "kofi",
    "lea",
    "mira",
    "noor",
    "otto",
    "petra",
    "quinn",
    "rosa",
    "sami",
    "tove",
    "uma",
    "viktor",
    "wren",
    "xin",
    "yara",
    "zoe",
)
PLACES = ("harbor", "meadow", "orchard", "atlas", "lantern", "quarry", "signal", "willow", "comet", "delta")
DISPLAY = (
    "Ana Ríos 🌊",
    "たなか えみ",
    "Grace (she/her)",
    "محمد فريد",
    "Zoë van Dijk",
    "O'Leary & Söhne",
    "𝕵𝖚𝖓",
    "Кофи",
    "",
    "noor ✨✨",
)
