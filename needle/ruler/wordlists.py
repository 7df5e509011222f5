"""English words for RULER's tasks, where the package that the official scripts draw from is not installed."""

from __future__ import annotations

NOUNS = tuple(
    """acorn actor airport album alley almond anchor animal ankle answer apple apron arch armor arrow artist atlas
    attic aunt autumn badge bakery balcony ballad bamboo banana banjo barrel basin basket battery beach beacon beard
    beetle bell bench berry bicycle binder birch biscuit blanket blossom boat bonnet book boot bottle boulder bowl
    bracelet branch bread breeze brick bridge broom brother bucket buffalo builder butter button cabin cable cactus
    cake camel camera campus canal candle canoe canvas canyon captain caravan carpet carrot cart castle cathedral
    cattle cave cellar chain chair chalk chapel cheese cherry chest chicken chimney circle circus clerk cliff clock
    cloud clover coach coast coffee coin collar comb comet compass copper coral corner cottage cotton couch cousin
    crane crater crayon creek cricket crown crystal cup curtain cushion dagger dancer daughter desert desk dinner
    doctor dolphin donkey door dragon drawer dream drum duck dungeon eagle earth echo elbow elephant ember emerald
    engine envelope evening fabric factory falcon farmer feather fence fern ferry festival fiddle field finger fire
    fish flag flame flute forest fork fossil fountain fox frog fruit funnel galaxy gallery garden garlic gate gazelle
    giant ginger giraffe glacier glove goat gold goose grain granite grape grass guitar hammer hammock harbor harp hat
    hawk hazel heart hedge helmet heron hill hinge honey hood horizon horn horse hotel hour house hunter igloo iron
    island ivory jacket jar jasmine jewel journal judge juice jungle kettle key kitchen kite kitten knee knight ladder
    lagoon lake lamp lantern leaf leather lemon letter library lily lion lizard locket lodge lumber magnet mango
    mantle maple marble market mask meadow medal melon mentor mill mirror mist monkey moon morning mosaic moss
    mountain mouse museum mushroom napkin nectar needle nephew nest night notebook nurse oak oasis oat ocean office
    olive onion orange orchard orchid otter oven owl oyster paddle painter palace palm panther paper parade parcel
    park parrot pasture path peach pearl pebble pencil pepper piano pillow pilot pine pirate planet plate plaza plum
    pocket poem poet pond poppy porch portrait potato pottery prairie prince puddle pumpkin puppet quarry queen quilt
    rabbit radio raft rain raven reef ribbon rice ring river road robin rocket roof rope rose ruby saddle sailor salad
    salmon salt sand sandal satchel scarf school scissors sea seal shadow sheep shell shepherd ship shore silk silver
    sister sketch sky sleeve snail snow soap sofa soldier song soup sparrow spice spider spoon spring squash stable
    stair star statue steam stone storm story stove stream street sugar summer sunset swan table tailor tea teacher
    temple tent theater thimble thread throne thunder tiger timber toast tomato torch tower town trail train tray
    treasure tree trumpet tulip tunnel turtle uncle valley vase velvet village vine violet violin voyage wagon walnut
    water wave wheat wheel whistle willow window winter wizard wolf wood wool yard yarn zebra""".split()
)
ADJECTIVES = tuple(
    """able active agile amber ample ancient arctic automatic average bare basic bitter blank bold brave brief bright
    broad brown busy calm careful cheap cheerful chilly clean clear clever close cold common complete cool cosmic
    crisp curious daily damp daring dark dear deep dense distant double dry dull dusty eager early earnest easy
    elastic empty equal even exact fair faithful familiar famous fancy far fast fearless few fine firm flat fluffy
    formal fresh friendly frozen full funny gentle glad golden good grand grateful great green handy happy hard heavy
    hidden high hollow honest huge humble idle jolly keen kind large late lazy lean light little lively local lone
    long loud loyal lucky main mellow mild modern modest muddy narrow native neat new noble normal odd old open orange
    pale patient plain pleasant polite poor proper proud pure quaint quick quiet rapid rare raw ready real remote rich
    ripe rough round royal rusty safe salty scarce secret serious shallow sharp short shy silent simple slim slow
    small smooth soft solid spare steady steep stiff still strange strict strong sudden sunny sure sweet swift tall
    tame tender thick thin tidy tight tiny tough true useful usual vast vivid warm weak wealthy wet white whole wide
    wild wise witty wooden young zesty""".split()
)
VERBS = tuple(
    """accept add admire agree allow appear argue arrive ask bake balance become begin believe belong bend blink boil
    borrow bounce breathe bring build burn buy carry catch change chase choose clap climb collect compare count cover
    crawl cross cry cut dance decide deliver describe dig divide draw drift drink drive drop earn eat enjoy enter
    explain explore fall feed feel fetch fill find finish float fly fold follow forget forgive gather give grow guess
    guide hang hear help hide hold hop hope hug hunt hurry imagine improve invite join jump keep kick knit knock know
    laugh lead learn leave lend lift listen live look make march measure meet melt mend move nod notice obey offer
    order pack paint pass pause peel pick plant play point polish pour praise press promise protect pull push put
    reach read remember repair reply rest return ride rise roll row rub run save say search see sell send serve sew
    shake share shine shout show sing sit skip sleep smile sort speak spell spend spin stand start stay stir stop
    stretch study swim swing take talk taste tell thank think throw tie touch trade travel trust try turn visit wait
    wake walk wander wash watch wave wear weave whisper win wish wonder work wrap write yawn""".split()
)
