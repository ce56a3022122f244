"""The real-world facts that the pocket model learns, as plain tables; :mod:`.facts` gives them their wording.

Contested or changing entries (seats of government that differ from the capital, countries on two continents) are left
out on purpose: a fact that is asked for must have one answer.
"""

from __future__ import annotations


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


# country, capital ("-": not asked), continent ("-": not asked)
COUNTRIES = """
France|Paris|Europe
Germany|Berlin|Europe
Italy|Rome|Europe
Spain|Madrid|Europe
Portugal|Lisbon|Europe
Ireland|Dublin|Europe
England|London|Europe
Scotland|Edinburgh|Europe
Wales|Cardiff|Europe
Belgium|Brussels|Europe
Austria|Vienna|Europe
Poland|Warsaw|Europe
Hungary|Budapest|Europe
Greece|Athens|Europe
Sweden|Stockholm|Europe
Norway|Oslo|Europe
Finland|Helsinki|Europe
Denmark|Copenhagen|Europe
Iceland|Reykjavik|Europe
Estonia|Tallinn|Europe
Latvia|Riga|Europe
Lithuania|Vilnius|Europe
Romania|Bucharest|Europe
Bulgaria|Sofia|Europe
Serbia|Belgrade|Europe
Croatia|Zagreb|Europe
Slovenia|Ljubljana|Europe
Slovakia|Bratislava|Europe
Albania|Tirana|Europe
Ukraine|Kyiv|Europe
Belarus|Minsk|Europe
Moldova|Chisinau|Europe
Malta|Valletta|Europe
Bosnia|Sarajevo|Europe
Montenegro|Podgorica|Europe
Switzerland|-|Europe
Russia|Moscow|-
Turkey|Ankara|-
China|Beijing|Asia
Japan|Tokyo|Asia
India|New Delhi|Asia
Nepal|Kathmandu|Asia
Bhutan|Thimphu|Asia
Bangladesh|Dhaka|Asia
Pakistan|Islamabad|Asia
Afghanistan|Kabul|Asia
Iran|Tehran|Asia
Iraq|Baghdad|Asia
Syria|Damascus|Asia
Lebanon|Beirut|Asia
Jordan|Amman|Asia
Oman|Muscat|Asia
Qatar|Doha|Asia
Bahrain|Manama|Asia
Thailand|Bangkok|Asia
Vietnam|Hanoi|Asia
Laos|Vientiane|Asia
Taiwan|Taipei|Asia
Mongolia|Ulaanbaatar|Asia
Uzbekistan|Tashkent|Asia
Tajikistan|Dushanbe|Asia
Turkmenistan|Ashgabat|Asia
Kyrgyzstan|Bishkek|Asia
Kazakhstan|Astana|-
Armenia|Yerevan|-
Georgia|Tbilisi|-
Azerbaijan|Baku|-
Cyprus|Nicosia|-
Egypt|Cairo|Africa
Libya|Tripoli|Africa
Tunisia|Tunis|Africa
Algeria|Algiers|Africa
Morocco|Rabat|Africa
Sudan|Khartoum|Africa
Ethiopia|-|Africa
Somalia|Mogadishu|Africa
Kenya|Nairobi|Africa
Uganda|Kampala|Africa
Rwanda|Kigali|Africa
Tanzania|-|Africa
Zambia|Lusaka|Africa
Zimbabwe|Harare|Africa
Malawi|Lilongwe|Africa
Mozambique|Maputo|Africa
Madagascar|Antananarivo|Africa
Namibia|Windhoek|Africa
Botswana|Gaborone|Africa
Angola|Luanda|Africa
Gabon|Libreville|Africa
Cameroon|Yaounde|Africa
Nigeria|Abuja|Africa
Niger|Niamey|Africa
Chad|-|Africa
Mali|Bamako|Africa
Ghana|Accra|Africa
Togo|Lome|Africa
Senegal|Dakar|Africa
Gambia|Banjul|Africa
Guinea|Conakry|Africa
Liberia|Monrovia|Africa
Eritrea|Asmara|Africa
Canada|Ottawa|North America
Mexico|Mexico City|North America
Cuba|Havana|North America
Jamaica|Kingston|North America
Haiti|-|North America
Barbados|Bridgetown|North America
Honduras|Tegucigalpa|North America
Nicaragua|Managua|North America
Belize|Belmopan|North America
Grenada|-|North America
Brazil|Brasilia|South America
Argentina|Buenos Aires|South America
Chile|Santiago|South America
Peru|Lima|South America
Ecuador|Quito|South America
Colombia|Bogota|South America
Venezuela|Caracas|South America
Uruguay|Montevideo|South America
Paraguay|Asuncion|South America
Guyana|Georgetown|South America
Suriname|Paramaribo|South America
Bolivia|-|South America
Australia|Canberra|Oceania
New Zealand|Wellington|Oceania
Fiji|Suva|Oceania
Samoa|Apia|Oceania
Tonga|-|Oceania
Vanuatu|-|Oceania
"""

# each pair is asked in both directions, so a word may stand in one pair only
OPPOSITES = """
hot cold|big small|tall short|fast slow|old young|good bad|happy sad|rich poor|strong weak|light dark
open closed|full empty|wet dry|hard soft|loud quiet|clean dirty|early late|near far|high low|wide narrow
thick thin|deep shallow|wrong correct|left right|up down|in out|day night|begin end|win lose|buy sell|push pull
love hate|give take|come go|first last|true false|always never|many few|more less|above below|before after
inside outside|over under|war peace|alive dead|sharp blunt|sweet bitter|rough smooth|tight loose|cheap expensive
easy difficult|safe dangerous|summer winter|brave cowardly|friend enemy|north south|east west|question answer
arrive depart|accept refuse|remember forget|laugh cry|same different|simple complex|guilty innocent|asleep awake
ancient modern|public private|success failure|victory defeat|increase decrease|import export|maximum minimum
front back|top bottom|male female|polite rude|lazy hardworking|wild tame|fresh stale|attack defend|floor ceiling
child adult|hero villain|odd even|positive negative|entrance exit|past future
"""

# things of one class, and no thing in two classes
CATEGORIES = {
    "fruit": "apple banana pear grape cherry lemon mango peach plum melon orange strawberry",
    "vegetable": "carrot potato onion cabbage spinach broccoli turnip leek celery pea",
    "bird": "sparrow eagle owl robin crow penguin swan duck parrot stork hawk pigeon",
    "fish": "salmon trout shark tuna cod herring carp eel",
    "insect": "ant bee wasp beetle fly moth butterfly mosquito",
    "mammal": "dog cat horse cow lion tiger elephant whale rabbit fox wolf bear",
    "reptile": "snake lizard turtle crocodile alligator gecko",
    "tree": "oak pine birch maple willow cedar beech",
    "flower": "rose tulip daisy lily violet orchid",
    "metal": "iron gold silver copper tin lead zinc",
    "tool": "hammer saw drill wrench axe chisel screwdriver",
    "instrument": "piano violin guitar flute drum trumpet harp cello",
    "vehicle": "car bus truck train bicycle tractor taxi tram",
    "sport": "tennis football hockey golf rugby cricket",
    "color": "red blue green yellow purple pink brown",
    "drink": "milk coffee tea juice water lemonade",
    "planet": "Mars Venus Jupiter Saturn Neptune Uranus Mercury",
    "garment": "shirt jacket skirt coat sweater scarf",
}
UNCOUNTED = frozenset({"metal", "sport", "color", "drink", "planet"})  # their things take no article

SYMBOLS = """
hydrogen H|helium He|lithium Li|beryllium Be|boron B|carbon C|nitrogen N|oxygen O|fluorine F|neon Ne|sodium Na
magnesium Mg|aluminum Al|silicon Si|phosphorus P|sulfur S|chlorine Cl|argon Ar|potassium K|calcium Ca
titanium Ti|chromium Cr|manganese Mn|iron Fe|cobalt Co|nickel Ni|copper Cu|zinc Zn|arsenic As|bromine Br
krypton Kr|silver Ag|tin Sn|iodine I|xenon Xe|barium Ba|tungsten W|platinum Pt|gold Au|mercury Hg|lead Pb
radon Rn|radium Ra|uranium U
"""

PASTS = """
go went|see saw|eat ate|run ran|come came|give gave|take took|make made|find found|know knew|think thought
bring brought|buy bought|catch caught|teach taught|fight fought|seek sought|sing sang|swim swam|drink drank
begin began|ring rang|sink sank|write wrote|drive drove|ride rode|rise rose|break broke|speak spoke|steal stole
choose chose|freeze froze|wake woke|fly flew|grow grew|throw threw|blow blew|draw drew|wear wore|tear tore
swear swore|bear bore|hold held|feel felt|keep kept|sleep slept|sweep swept|weep wept|leave left|meet met
lose lost|send sent|spend spent|bend bent|build built|lend lent|tell told|sell sold|stand stood|hear heard
say said|pay paid|win won|sit sat|get got|forget forgot|shoot shot|hide hid|bite bit|fall fell|dig dug|hang hung
shake shook|feed fed|lead led|become became|understand understood|slide slid|sting stung
"""

PLURALS = """
man men|woman women|child children|foot feet|tooth teeth|goose geese|mouse mice|ox oxen|leaf leaves|knife knives
wife wives|wolf wolves|half halves|shelf shelves|loaf loaves|thief thieves|calf calves|baby babies|city cities
lady ladies|story stories|party parties|cherry cherries|fly flies|country countries|box boxes|fox foxes
dish dishes|bush bushes|watch watches|church churches|bus buses|glass glasses|potato potatoes|tomato tomatoes
hero heroes|person people|louse lice|cactus cacti
"""

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = words("January February March April May June July August September October November December")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def pairs(table: str) -> list[tuple[str, str]]:
    """The two-word entries of a table of the form ``a b|c d`` over several lines."""
    cells = [cell.split() for line in table.strip().splitlines() for cell in line.split("|")]
    return [(left, right) for left, right in cells]


def countries() -> list[tuple[str, str, str]]:
    """Rows ``(country, capital, continent)``; ``-`` where the pocket model is not asked."""
    rows = [line.split("|") for line in COUNTRIES.strip().splitlines()]
    return [(country, capital, continent) for country, capital, continent in rows]
