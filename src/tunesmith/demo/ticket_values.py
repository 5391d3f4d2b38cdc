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
    "Jacob", "Monica", "Abel", "Ada", "Agata", "Agnes", "Aidan", "Alan", "Alba", "Aldo", "Alex", "Alfred",
    "Ali", "Alicia", "Alma", "Alvaro", "Amir", "Amina", "Anders", "Andrea", "Angela", "Anita", "Anton",
    "April", "Ari", "Astrid", "Aurora", "Axel", "Barbara", "Bashir", "Basil", "Bella", "Benedict", "Bianca",
    "Bjorn", "Boris", "Brenda", "Brian", "Bridget", "Camille", "Carla", "Carlos", "Cecil", "Chiara",
    "Chloe", "Christa", "Claude", "Colin", "Conrad", "Cora", "Cyril", "Dalia", "Damian", "Deepak", "Denise",
    "Desmond", "Dilip", "Dinah", "Dmitri", "Dominic", "Donna", "Doris", "Douglas", "Dylan", "Edgar",
    "Edwin", "Eileen", "Elias", "Elisa", "Ella", "Ellen", "Elliot", "Elsa", "Enzo", "Erica", "Erik",
    "Esther", "Ethan", "Eugene", "Evelyn", "Fabian", "Farah", "Fergus", "Filip", "Flora", "Frances",
    "Freya", "Gabriel", "Gemma", "Gerald", "Gina", "Giulia", "Gloria", "Gordon", "Graham", "Gwen", "Hana",
    "Hans", "Harold", "Hazel", "Hector", "Heidi", "Hiroshi", "Holly", "Howard", "Ian", "Ilse", "Imran",
    "Ines", "Ingo", "Iris", "Isaac", "Ismail", "Jack", "Jade", "Jamal", "Jan", "Jasmin", "Jean", "Jeremy",
    "Joan", "Joel", "Johan", "Jorge", "Joseph", "Joy", "Judith", "Julian", "June", "Kai", "Kamal", "Karen",
    "Karim", "Keith", "Kenji", "Kim", "Kirsten", "Klaus", "Lara", "Lea", "Leon", "Lena", "Liam", "Lilian",
    "Lisa", "Lorenzo", "Lucas", "Luis", "Luna", "Lydia", "Magda", "Maja", "Malik", "Marc", "Marco",
    "Margaret", "Marina", "Mario", "Matilda", "Matteo", "May", "Megan", "Melanie", "Mia", "Milan", "Mila",
    "Mina", "Mohamed", "Moritz", "Murat", "Nadia", "Nathan", "Neil", "Nick", "Nico", "Nigel", "Noah",
    "Noor", "Norbert", "Olaf", "Olive", "Oliver", "Orla", "Pablo", "Pamela", "Pascal", "Patricia", "Pavel",
    "Pedro", "Pia", "Rafael", "Rania", "Raymond", "Rebecca", "Reza", "Rhea", "Rita", "Roger", "Roland",
    "Roman", "Ronja", "Rosie", "Rudolf", "Sabine", "Sally", "Samir", "Sanjay", "Sara", "Saskia", "Sean",
    "Sergei", "Shirin", "Sibyl", "Silvia", "Sofie", "Stella", "Sunita", "Sylvester", "Tamara", "Tariq",
    "Theo", "Thomas", "Tilda", "Timo", "Tobias", "Tony", "Uma", "Valentin", "Valerie", "Veronica",
    "Vincent", "Viola", "Wanda", "Wendy", "Wilma", "Yasmin", "Yusuf", "Yvette", "Zara",
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
    "cotton", "red", "white", "heavy", "amber", "analog", "antique", "aqua", "Arctic", "Atlas", "Aurora",
    "baby", "beige", "Blaze", "blue", "bronze", "brown", "Cascade", "Cedar", "chrome", "coastal", "Cobalt",
    "corner", "country", "crystal", "Dawn", "deep", "deluxe", "desk", "Dune", "Echo", "elastic", "Ember",
    "enamel", "Everest", "extra", "fabric", "felt", "Fern", "Flint", "floral", "foam", "frosted", "Galaxy",
    "gas", "gentle", "giant", "Glacier", "gold", "golden", "granite", "grey", "Halo", "handmade", "hanging",
    "Hazel", "herbal", "high", "Horizon", "hybrid", "Icon", "indoor", "inflatable", "ivory", "Jade",
    "jumbo", "Jupiter", "Kestrel", "kitchen", "large", "laser", "lemon", "light", "little", "long", "low",
    "magnetic", "maple", "Mars", "matte", "maxi", "Meadow", "medium", "Mercury", "metal", "Metro", "micro",
    "midnight", "Mistral", "modern", "motion", "Nova", "office", "olive", "orange", "outdoor", "oval",
    "Panda", "paper", "pastel", "pearl", "Phoenix", "pine", "pink", "Pixel", "plain", "plastic", "pocket",
    "Prairie", "Prime", "purple", "quartz", "quick", "Quest", "quiet", "Raven", "retro", "ribbed", "Ridge",
    "robot", "rose", "round", "royal", "rubber", "rustic", "Safari", "sand", "satin", "Sierra", "silk",
    "single", "slim", "small", "soft", "Sonic", "sport", "spring", "square", "Star", "Storm", "stone",
    "straw", "striped", "suede", "summer", "Sunrise", "super", "Swift", "tall", "teak", "thermal", "thin",
    "Titan", "top", "Trail", "triple", "turbo", "twin", "ultra", "universal", "urban", "Valley", "vintage",
    "violet", "warm", "waterproof", "Wave", "white-oak", "wide", "wicker", "wild", "wind", "winter", "wool",
    "yellow", "Zen", "zinc", "Zephyr",
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
    "sofa bed", "door bell", "bench", "tablet", "air fryer", "alarm clock", "armchair", "baby monitor",
    "baking tray", "bath mat", "bath tub", "beach towel", "belt", "bike lock", "binoculars", "blanket",
    "board game", "boots", "bowl", "bracelet", "bread maker", "briefcase", "broom", "bucket", "cable",
    "cake stand", "calculator", "candle holder", "car seat", "carpet", "charger", "chess set", "coat",
    "coat rack", "coffee grinder", "cooler box", "cot", "couch", "curtain", "cushion", "cutlery set",
    "dart board", "desk", "dinner set", "dishwasher", "doll house", "drawer unit", "dress", "drum kit",
    "duvet", "ear buds", "easel", "electric kettle", "espresso cup", "exercise bike", "fire pit",
    "flashlight", "flower pot", "food processor", "football", "freezer", "garden hose", "gloves", "guitar",
    "hair clipper", "handbag", "hard drive", "hat", "hedge trimmer", "helmet", "high chair", "hoodie",
    "humidifier", "ice maker", "ink set", "iron", "ironing board", "jeans", "jewel box", "joystick", "jug",
    "knife set", "ladder", "lamp shade", "laundry basket", "lunch box", "magnifier", "massage chair",
    "measuring tape", "microwave", "milk frother", "mobile phone", "mouse", "mug", "music stand",
    "necklace", "night light", "notebook", "office chair", "paint set", "paper shredder", "pencil case",
    "pillow", "pizza stone", "plant stand", "play tent", "plate set", "power bank", "pressure cooker",
    "pump", "puzzle", "pyjamas", "raincoat", "record player", "recliner", "remote control", "ring",
    "rocking chair", "rucksack", "running shoes", "safe", "sander", "sandals", "saw", "scanner", "scarf",
    "screwdriver set", "shaver", "shelf", "shirt", "shoe rack", "shower head", "side table", "skateboard",
    "ski jacket", "slow cooker", "smoke alarm", "snow shovel", "sofa", "soup pot", "spice rack", "sun hat",
    "swimsuit", "tea pot", "telescope", "tennis racket", "thermos", "tie", "tool box", "toothbrush",
    "towel rail", "toy train", "trampoline", "tripod", "trolley", "trousers", "turntable", "tv stand",
    "vase", "video camera", "violin", "waffle iron", "walking stick", "wallet", "wall clock", "webcam",
    "weight set", "wine rack", "wok", "work bench", "yoga mat",
)  # fmt: skip
PRODUCT_KINDS_TEST = (
    "lantern", "juicer", "stool", "microphone", "wardrobe", "razor", "oven", "projector", "hammock",
    "scale", "cabinet", "sewing machine", "laptop bag", "bottle", "mixer", "lawn mower", "pan",
    "thermometer", "water filter", "bed frame",
)  # fmt: skip
