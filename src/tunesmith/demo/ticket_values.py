"""Slot values of `tunesmith/tickets`. Lists named *_TEST are used in the sealed test only, and nowhere else."""

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip

CURRENCIES = {
    "EUR": ("{} euros", "€{}", "EUR {}", "{} EUR"),
    "USD": ("{} dollars", "${}", "USD {}", "${}"),
    "GBP": ("{} pounds", "£{}", "GBP {}", "£{}"),
}

NAMES = (
    "Maria", "Peter", "Aisha", "Lars", "Nina", "Tom", "Clara", "Igor", "Helen", "Omar", "Julia", "Mark",
    "Sofia", "Ben", "Greta", "Paul", "Yuki", "Anna", "Victor", "Rosa", "Emil", "Kate", "Hassan", "Lucy",
    "Oscar", "Eva", "Martin", "Priya", "Simon", "Olga", "Daniel", "Ingrid", "Leo", "Fatima", "George",
    "Mei", "Robert", "Alice", "Stefan", "Carmen", "Hugo", "Laura", "Ahmed", "Ruth", "Philip", "Elena",
    "Jonas", "Grace", "Ivan", "Marta", "Felix", "Irene", "Samuel", "Nora", "Adam", "Beatrice", "Karl",
    "Linda", "Ravi", "Susan", "Max", "Teresa", "Walter", "Zoe", "Arthur", "Diana", "Frank", "Hanna",
    "Jacob", "Monica",
)  # fmt: skip
NAMES_TEST = (
    "Amelia", "Bruno", "Celia", "David", "Edith", "Fiona", "Gustav", "Harriet", "Isabel", "James", "Kofi",
    "Leila", "Miguel", "Naomi", "Otto", "Petra", "Quentin", "Rachel", "Sven", "Tara", "Ursula", "Vera",
    "William", "Yvonne", "Albert", "Charlotte", "Dora", "Edward", "Henry", "Louise",
)  # fmt: skip
STAFF = (
    "Mr Bell",
    "Ms Gray",
    "Mrs Stone",
    "Mr Young",
    "Mr Chris Hall",
    "Ms Sandra Lane",
    "Mrs Weber",
    "Mr Singh",
)

PRODUCT_STYLES = (
    "Alto", "walnut", "Nordic", "steel", "folding", "garden", "Breeze", "wireless", "copper", "Luna",
    "travel", "oak", "Comet", "electric", "ceramic", "mini", "Delta", "leather", "classic", "bamboo",
    "Rapid", "silver", "kids", "Orion", "solar", "portable", "velvet", "Pearl", "digital", "iron", "Summit",
    "cotton", "red", "white", "heavy",
)  # fmt: skip
PRODUCT_STYLES_TEST = (
    "Falcon", "glass", "brass", "River", "marble", "compact", "Vega", "black", "wooden", "Polar", "linen",
    "smart", "Harbor", "green", "double", "Tempo", "wall", "silent",
)  # fmt: skip
PRODUCT_KINDS = (
    "kettle", "desk lamp", "chair", "toaster", "headphones", "backpack", "bookshelf", "blender", "watch",
    "keyboard", "tent", "mirror", "radio", "coffee machine", "vacuum cleaner", "printer", "bicycle pump",
    "jacket", "camera", "drill", "speaker", "mattress", "clock", "table", "umbrella", "phone case", "rug",
    "heater", "scooter", "router", "fan", "suitcase", "grill", "monitor", "hair dryer", "rice cooker",
    "sofa bed", "door bell", "bench", "tablet",
)  # fmt: skip
PRODUCT_KINDS_TEST = (
    "lantern", "juicer", "stool", "microphone", "wardrobe", "razor", "oven", "projector", "hammock",
    "scale", "cabinet", "sewing machine", "laptop bag", "bottle", "mixer", "lawn mower", "pan",
    "thermometer", "water filter", "bed frame",
)  # fmt: skip
