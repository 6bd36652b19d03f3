"""Generating rows of Hadamard matrices whose orders Paley's constructions miss.

``ROWS[t]``: four +-1 circulant rows of length t whose periodic autocorrelations sum to 0 at every
shift, hence a Hadamard matrix of order 4 t by the Goethals-Seidel array. Hexadecimal; bit i is set
where entry i is -1. Found by search over unions of orbits of a multiplier group of Z_t; 107 follows
from the Turyn-type sequences of length 36 of H. Kharaghani and B. Tayfeh-Rezaie (2005).
"""

ROWS: dict[int, tuple[str, str, str, str]] = {
    23: ("675ae6", "70180e", "296694", "41db82"),
    29: ("715ea38", "657fa98", "1a0ccc16", "4b12348"),
    39: ("3c6855dbca", "344414b9c0", "640e96afd8", "11dc0cb26c"),
    43: ("22e743d18ba", "5e7fddc15ec", "34cf5a50cd2", "36761ef2a8"),
    65: ("1b78ea13b7615e7b6", "1a65fa6581b8a8ec", "1e58a051a7a477712", "1c682c7abfa667fd4"),
    67: ("251dd1f0c02713e68", "7df24abd940e506c4", "549db90d442914838", "5c1358b6c65e70442"),
    73: (
        "1a25619de50e5ecba48", "1a3138097b15075cfb6",
        "1a347980bb1b41567b6", "1eb23c743f91b9d57fe",
    ),
    93: (
        "1a3529c9764bc719e9b5977e", "58f42edd073b38bcd51bd7e",
        "1a2031416d0dc059b38d53de", "55dd9e9bce0ff65a3ec6a0",
    ),
    101: (
        "11a2b4bfcba083e95accf3ea76", "134699cc46af78249c2618fa8",
        "de0b8b0c0ca0fef1ffc659eba", "128a94333b5702ba9301b26656",
    ),
    107: (
        "5e121f53c21158b3e8768c88682", "4e10cdac121158b3e889737797d",
        "5e121f53c5eea74c1789737797d", "31ef3253ea1158b3e889737797d",
    ),
    113: (
        "1522f7679d09b1181002f28b810fc", "1360ee0695701314a886b5a5924b6",
        "1c152a9afe123e23c1230aeecfbb0", "925deb43719873bc122b8e5ce364",
    ),
    119: (
        "69c7b06aca113d99b48857560fe396", "7febacdb98f4f68f92d4ee34ea6880",
        "145724772b59706f2f1dcb37977e", "116172c572b59f1672f1ddb37d7fe",
    ),
    127: (
        "6de2ec09ecf50597b8a1af374137977e", "7eecf9e1fa82a952ead9c01c8d863248",
        "7a9897c5877ee572c47b3ebcad663a48", "4310f1745ea537b2537b8dd374f7bde",
    ),
    133: (
        "e4acd1f869c927ccb87623e7952e856f2", "1c11c94d5822a274ab887234e918c90aea",
        "13d112faff2f71c9fe59bc42a12c65dd0c", "1c10dfed2182c375bfdafe34691cc803ea",
    ),
    163: (
        "29c3d98e61145990178aeae56d6f4d7c9267c9c4a", "1ef6fe7df450ca837ff5227ab60ce1e981762dd58",
        "3d9e591f043fe858074ab32a337a2e9d60261cade", "2149a182e12f31d9281bd9854973cf547211d1286",
    ),
}
